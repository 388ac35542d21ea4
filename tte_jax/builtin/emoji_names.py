"""Names and attributes of emoji, read from their code-point sequences.

The attributes in which variants of one drawing differ (skin tone, gender, hair) are what composed
queries change; the *family* is what stays the same. Names are those of the `emoji` package, which
are Unicode's short names.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

from tte_jax.errors import PreconditionError

SKIN_TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B2: "bald", 0x1F9B3: "white"}
NONE = "none"

_ZWJ, _VARIATION, _KEYCAP, _RIGHT = 0x200D, 0xFE0F, 0x20E3, 0x27A1
_SIGNS = {0x2640: "woman", 0x2642: "man"}
_ADULTS = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}
_CHILDREN = {0x1F466: "man", 0x1F467: "woman", 0x1F9D2: "person"}
_FAMILY = (0x1F46A,)

# Sequences that Unicode encodes apart although only gender tells them from the right-hand side.
_NEUTRAL = {
    (0x1F468,): (0x1F9D1,),
    (0x1F469,): (0x1F9D1,),
    (0x1F466,): (0x1F9D2,),
    (0x1F467,): (0x1F9D2,),
    (0x1F474,): (0x1F9D3,),
    (0x1F475,): (0x1F9D3,),
    (0x1F934,): (0x1FAC5,),
    (0x1F478,): (0x1FAC5,),
    (0x1F385,): (0x1F9D1, _ZWJ, 0x1F384),
    (0x1F936,): (0x1F9D1, _ZWJ, 0x1F384),
    (0x1F930,): (0x1FAC4,),
    (0x1FAC3,): (0x1FAC4,),
    (0x1F57A,): (0x1F483,),
    (0x1F46B,): (0x1F9D1, _ZWJ, 0x1F91D, _ZWJ, 0x1F9D1),
    (0x1F46C,): (0x1F9D1, _ZWJ, 0x1F91D, _ZWJ, 0x1F9D1),
    (0x1F46D,): (0x1F9D1, _ZWJ, 0x1F91D, _ZWJ, 0x1F9D1),
    (0x1F9D1, _ZWJ, 0x2764, _ZWJ, 0x1F9D1): (0x1F491,),
    (0x1F9D1, _ZWJ, 0x2764, _ZWJ, 0x1F48B, _ZWJ, 0x1F9D1): (0x1F48F,),
    (0x1F9D1, _ZWJ, 0x1F430, _ZWJ, 0x1F9D1): (0x1F46F,),
    (0x1F9D1, _ZWJ, 0x1FAEF, _ZWJ, 0x1F9D1): (0x1F93C,),
    (0x1FAF1, _ZWJ, 0x1FAF2): (0x1F91D,),
}
# Families whose neutral member is named after one gender only.
_FAMILY_NAMES = {
    (0x1F483,): "dancing",
    (0x1F9D1, _ZWJ, 0x1F384): "santa claus",
    (0x1F9D1, _ZWJ, 0x1F91D, _ZWJ, 0x1F9D1): "people holding hands",
    (0x1F471,): "person with blond hair",
    (0x1F9D4,): "person with beard",
}
_GENDER_WORDS = {
    "man": "man", "men": "man", "prince": "man", "king": "man", "boy": "man", "santa": "man",
    "woman": "woman", "women": "woman", "princess": "woman", "queen": "woman", "girl": "woman",
    "mrs.": "woman", "breast-feeding": "woman",
}  # fmt: skip


@dataclass(frozen=True)
class Attributes:
    """What an emoji sequence shows.

    Attributes:
      name: Unicode's short name, e.g. "woman technologist: dark skin tone".
      family: the name without skin tone, gender, hair and direction, e.g. "technologist".
      group: "flags", "keycaps", "people-body" or "" where the code points do not tell.
      skin: "none", a tone, or two tones joined by "+" where two people differ.
      gender: "none", "person", "man" or "woman"; "none" for couples and families.
      hair: "none", "red", "curly", "bald", "white" or "blond".
    """

    name: str
    family: str
    group: str = ""
    skin: str = NONE
    gender: str = NONE
    hair: str = NONE


def code_points(hexcode: str) -> tuple[int, ...]:
    """ "1F469-1F3FF-200D-1F4BB" → its code points. Raises ValueError for anything else."""
    return tuple(int(part, 16) for part in hexcode.split("-"))


def is_flag(points: tuple[int, ...]) -> bool:
    """Two regional indicators, or the black flag with a tag sequence."""
    return (len(points) == 2 and all(0x1F1E6 <= p <= 0x1F1FF for p in points)) or (
        len(points) > 2 and points[0] == 0x1F3F4 and 0xE0000 <= points[1] <= 0xE007F
    )


def is_keycap(points: tuple[int, ...]) -> bool:
    return points[-1] == _KEYCAP


@functools.cache
def names() -> dict[tuple[int, ...], str]:
    """Code points without U+FE0F → name, for every emoji that Unicode recommends.

    Raises PreconditionError when the `emoji` package is missing.
    """
    try:
        import emoji
    except ImportError as error:
        raise PreconditionError(
            "The built-in corpus takes its names from the package `emoji`, which is not "
            "installed; run `pip install emoji`.",
            reason="PACKAGE_MISSING",
            package="emoji",
        ) from error
    table: dict[tuple[int, ...], str] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = tuple(ord(c) for c in text if ord(c) != _VARIATION)
        if entry["status"] <= emoji.STATUS["fully_qualified"] or points not in table:
            table[points] = entry["en"].strip(":").replace("_", " ")
    return table


def attributes(hexcode: str) -> Attributes | None:
    """Name and attributes of an emoji, or None when it is not one that Unicode recommends."""
    points = tuple(p for p in code_points(hexcode) if p != _VARIATION)
    raw = names().get(points)
    if raw is None:
        return None
    if is_flag(points):
        return Attributes(name=f"flag: {raw}", family=f"flag: {raw}", group="flags")
    if is_keycap(points):
        return Attributes(name=raw, family=raw, group="keycaps")
    tones = [SKIN_TONES[p] for p in points if p in SKIN_TONES]
    skin = NONE if not tones else tones[0] if len(set(tones)) == 1 else "+".join(tones)
    hair = next((HAIR[p] for p in points if p in HAIR and len(points) > 1), NONE)
    bare = tuple(p for p in points if p not in SKIN_TONES) or points
    if bare[:1] == (0x1F471,):
        hair = "blond"
    gender = _gender(bare)
    residue = _residue(bare)
    people = gender != NONE or residue == _FAMILY or _takes_skin(bare) or bool(tones)
    return Attributes(
        name=_with_colon(raw),
        family=_family_name(residue) or _with_colon(raw),
        group="people-body" if people else "",
        skin=skin,
        gender=gender,
        hair=hair,
    )


def unicode_name(hexcode: str) -> str:
    """Unicode's character name in lower case, or "" (sequences, private use)."""
    points = [p for p in code_points(hexcode) if p != _VARIATION]
    return unicodedata.name(chr(points[0]), "").lower() if len(points) == 1 else ""


def _gender(bare: tuple[int, ...]) -> str:
    people = [p for p in bare if p in _ADULTS or p in _CHILDREN]
    if len(people) > 1 or bare in ((0x1F46A,), (0x1F46B,), (0x1F46C,), (0x1F46D,)):
        return NONE
    for point in bare[1:]:
        if point in _SIGNS:
            return _SIGNS[point]
    if bare[0] in _ADULTS:
        return _ADULTS[bare[0]]
    if bare[0] in _CHILDREN:
        return _CHILDREN[bare[0]]
    words = re.split(r"[\s:,]+", names().get(bare, "").lower())
    # "man's shoe", "women's room" and "men holding hands" are things or several people.
    if _takes_skin(bare) and (word := next((w for w in words if w in _GENDER_WORDS), "")):
        return _GENDER_WORDS[word]
    gendered = (*bare, _ZWJ, 0x2640) in names()
    return "person" if gendered or (_takes_skin(bare) and "person" in words) else NONE


def _takes_skin(bare: tuple[int, ...]) -> bool:
    return (bare[0], 0x1F3FB, *bare[1:]) in names()


def _residue(bare: tuple[int, ...]) -> tuple[int, ...]:
    """The sequence with every attribute taken away; itself when it shows no person."""
    points: list[int] = []
    for point in bare:
        droppable = point in _SIGNS or point in HAIR or point == _RIGHT
        if droppable and points and points[-1] == _ZWJ:
            points.pop()
        else:
            points.append(point)
    if len(points) > 1:
        points = [0x1F9D1 if p in _ADULTS else p for p in points]
        if {0x1F9D1, _ZWJ, *_CHILDREN} >= set(points):
            return _FAMILY
    residue = tuple(points)
    return _NEUTRAL.get(residue, residue)


def _family_name(residue: tuple[int, ...]) -> str:
    if residue in _FAMILY_NAMES:
        return _FAMILY_NAMES[residue]
    name = names().get(residue, "")
    match = re.fullmatch(r"(?:person|people) ((?:\w+ )?\w+ing\b.*)", name)
    return match[1] if match else name


def _with_colon(name: str) -> str:
    """ "man dark skin tone red hair" → "man: dark skin tone, red hair", as Unicode writes it."""
    found = re.search(
        r" ((?:light|medium-light|medium|medium-dark|dark) skin tone.*|red hair|curly hair|bald"
        r"|white hair|blond hair)$",
        name,
    )
    if found is None:
        return name
    head, tail = name[: found.start()], found[1]
    return f"{head}: " + re.sub(r"(skin tone) ", r"\1, ", tail)
