"""Emoji as concepts: what each one shows, its texts, and the attributes in which variants differ.

A *concept* is one emoji sequence. Its *family* is what remains when gender, skin tone, hair and
direction are taken away: every technologist, of any gender and tone, is of one family. Splits are
drawn per family, since variants of one drawing would otherwise leak from training into evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

SKINS = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("none", "person", "man", "woman")

_TONES = {"1f3fb": 1, "1f3fc": 2, "1f3fd": 3, "1f3fe": 4, "1f3ff": 5}
_HAIR = {"1f9b0": "red hair", "1f9b1": "curly hair", "1f9b2": "bald", "1f9b3": "white hair"}
_SIGNS = {"2640": "woman", "2642": "man"}
_ADULTS = {"1f468": "man", "1f469": "woman", "1f9d1": "person"}
_CHILDREN = {"1f466", "1f467", "1f9d2"}
_ZWJ = "200d"
_RIGHT = "27a1"
_PEOPLE_GROUP = "people-body"

# Sequences that Unicode encodes apart although they differ from the right-hand side only in the
# attributes we factor out.
_SAME_FAMILY = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f471": "1f9d1",  # blond hair
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
    "1f483": "1f57a",
    "1f478": "1fac5",
    "1f934": "1fac5",
    "1f385": "1f9d1-200d-1f384",
    "1f936": "1f9d1-200d-1f384",
    "1f930": "1fac4",
    "1fac3": "1fac4",
    "1faf1-200d-1faf2": "1f91d",
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f9d1-200d-2764-200d-1f9d1": "1f491",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",
}

# Family names that no rule over the label yields.
_NAMES = {
    "1f9d1": "person",
    "1f9d2": "child",
    "1f9d4": "person with beard",
    "1f57a": "dancing",
    "1fac5": "person with crown",
    "1f9d1-200d-1f384": "santa claus",
    "1f46a": "family",
    "1f6b5": "mountain biking",
}

_GENDER_WORDS = {
    "man": "man", "men": "man", "boy": "man", "prince": "man", "king": "man", "merman": "man",
    "father": "man", "santa": "man", "grandfather": "man",
    "woman": "woman", "women": "woman", "girl": "woman", "princess": "woman", "queen": "woman",
    "mermaid": "woman", "mother": "woman", "mrs.": "woman", "breast-feeding": "woman",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One emoji sequence with its texts and attributes.

    `key` is the code points in lower case without U+FE0F, joined by "-"; it identifies the concept
    in every file of the data set. `hexcode` is emojibase's spelling (upper case, with FE0F).
    `base` is the key without skin tones, `family` the key of the family's representative, `name` a
    lower-case label without attributes. `tones` lists the skin tones (1 light .. 5 dark), two when
    two people differ. `multi_person` marks couples, families and two-tone sequences, whose
    attributes one gender and one tone cannot describe; their `gender` is "none", and so is `skin`
    when the tones differ.
    """

    key: str
    hexcode: str
    emoji: str
    label: str
    name: str
    tags: tuple[str, ...]
    shortcodes: tuple[str, ...]
    group: str
    subgroup: str
    base: str
    family: str
    gender: str
    skin: str
    hair: str
    direction: str
    tones: tuple[int, ...]
    multi_person: bool
    order: int

    @property
    def combination(self) -> str:
        """The (family, gender, skin) triple that is held out as a whole."""
        return f"{self.family}|{self.gender}|{self.skin}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields."""
        return asdict(self)

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Concept:
        """Inverse of `to_json`."""
        values = dict(row)
        for field in ("tags", "shortcodes", "tones"):
            values[field] = tuple(values[field])
        return Concept(**values)


def normalise_key(hexcode: str) -> str:
    """ "1F469-1F3FF-200D-1F4BB" or "2764-FE0F" -> lower case, "-"-joined, without U+FE0F."""
    return "-".join(p for p in re.split(r"[-_ ]", hexcode.lower()) if p != "fe0f")


def _drop_joined(points: list[str], marks: Iterable[str]) -> list[str]:
    """Removes each `ZWJ mark` pair."""
    kept: list[str] = []
    for point in points:
        if point in marks and kept and kept[-1] == _ZWJ:
            kept.pop()
        else:
            kept.append(point)
    return kept


def family_key(key: str, *, people: bool) -> str:
    """The key of the family that `key` belongs to; outside the people group, the key itself."""
    points = [p for p in key.split("-") if p not in _TONES]
    if not people:
        return "-".join(points)
    points = _drop_joined(points, {*_HAIR, *_SIGNS, _RIGHT})
    if len(points) > 1:
        points = ["1f9d1" if p in _ADULTS else p for p in points]
        if _ZWJ in points and {"1f9d1", _ZWJ, *_CHILDREN} >= set(points):
            return "1f46a"
    residue = "-".join(points)
    return _SAME_FAMILY.get(residue, residue)


def _gender(points: list[str], label: str) -> str:
    for point in points:
        if point in _SIGNS:
            return _SIGNS[point]
    if points[0] in _ADULTS:
        return _ADULTS[points[0]]
    for word in re.split(r"[\s:,]+", label.lower()):
        if word in _GENDER_WORDS:
            return _GENDER_WORDS[word]
    return "person"


def _tone_list(tone: int | list[int] | None) -> tuple[int, ...]:
    if tone is None:
        return ()
    return tuple(tone) if isinstance(tone, list) else (tone,)


def _family_name(label: str) -> str:
    """ "person running" -> "running", "woman with headscarf" -> "person with headscarf"."""
    text = label.lower().replace("“", '"').replace("”", '"').replace("’", "'")
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    match = re.match(r"(person|man|woman|people|men|women):? (.+)", text)
    if match is None:
        return text
    subject = "people" if match[1] in ("people", "men", "women") else "person"
    rest = match[2].removesuffix(" facing right")
    return rest if rest.split()[0].endswith("ing") else f"{subject} {rest}"


def build_concepts(
    data: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Any],
    shortcode_sets: Iterable[Mapping[str, str | list[str]]],
) -> list[Concept]:
    """Concepts of emojibase's `data.json` (skin variants included), in emojibase's order.

    `groups` is `meta/groups.json`, `shortcode_sets` any number of `shortcodes/*.json`.
    """
    codes: dict[str, dict[str, None]] = {}
    for preset in shortcode_sets:
        for hexcode, names in preset.items():
            entry = codes.setdefault(normalise_key(hexcode), {})
            entry.update(dict.fromkeys([names] if isinstance(names, str) else names))

    rows: list[dict[str, Any]] = []
    for parent in data:
        for entry in (parent, *parent.get("skins", ())):
            group = groups["groups"].get(str(entry.get("group")), "component")
            people = group == _PEOPLE_GROUP
            key = normalise_key(entry["hexcode"])
            points = key.split("-")
            bare = [p for p in points if p not in _TONES]
            family = family_key(key, people=people)
            tones = _tone_list(entry.get("tone"))
            subgroup = groups["subgroups"].get(str(entry.get("subgroup")), "component")
            several = subgroup == "family" or len(set(tones)) > 1
            person = people and subgroup.startswith("person") and subgroup != "person-symbol"
            hair = next((_HAIR[p] for p in points[1:] if p in _HAIR), "none") if people else "none"
            if people and bare[0] == "1f471":
                hair = "blond hair"
            rows.append({
                "key": key,
                "hexcode": entry["hexcode"],
                "emoji": entry["emoji"],
                "label": entry["label"],
                "tags": tuple(parent.get("tags", ())),
                "shortcodes": tuple(codes.get(key, ())),
                "group": group,
                "subgroup": subgroup,
                "base": normalise_key(parent["hexcode"]),
                "family": family,
                "gender": _gender(bare, entry["label"]) if person and not several else "none",
                "skin": SKINS[tones[0]] if len(set(tones)) == 1 else "none",
                "hair": hair,
                "direction": "right" if people and _RIGHT in points else "none",
                "tones": tones,
                "multi_person": several,
                "order": int(entry.get("order", 0)),
            })  # fmt: skip

    labels: dict[str, str] = {}
    for row in rows:  # the representative itself, else the family's first member
        if row["key"] == row["family"] or row["family"] not in labels:
            labels[row["family"]] = row["label"]
    return [
        Concept(name=_NAMES.get(r["family"]) or _family_name(labels[r["family"]]), **r)
        for r in rows
    ]
