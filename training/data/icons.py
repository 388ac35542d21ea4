"""Which icon of an icon set draws which emoji.

Sets with a `chars.json` say it themselves. The older sets name their icons only, so a name is
looked up among the names the other sets use, emojibase's labels, Unicode's names and shortcodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.data.concepts import Concept, normalise_key


@dataclass(frozen=True)
class Icon:
    """SVG `body` with its view box (`left`, `top`, `width`, `height`, in the set's own units)."""

    name: str
    body: str
    left: float
    top: float
    width: float
    height: float

    @property
    def drawing(self) -> str:
        """Text that two icons share when their pictures are the same: Iconify's ids are random."""
        ids: dict[str, str] = {}
        body = re.sub(r"SVG\w{8}", lambda m: ids.setdefault(m[0], f"SVG{len(ids)}"), self.body)
        return f"{self.left} {self.top} {self.width} {self.height} {body}"


def slug(text: str) -> str:
    """Letters and digits only, lower case: the form in which names of all sets are compared."""
    text = text.lower().replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    text = re.sub(r"^flag[- ]for[- ]", "flag-", text)
    return "".join(ch for ch in text if ch.isalnum())


def read_icons(icon_set: Mapping[str, Any]) -> dict[str, Icon]:
    """All icons of an Iconify set, aliases resolved (with their flips and rotations).

    Raises KeyError when an alias names a missing parent.
    """
    width, height = float(icon_set.get("width", 16)), float(icon_set.get("height", 16))
    aliases: Mapping[str, Any] = icon_set.get("aliases", {})

    def resolve(name: str) -> Icon:
        entry = icon_set["icons"].get(name)
        if entry is None:
            parent = resolve(aliases[name]["parent"])
            return Icon(name, _transform(parent, aliases[name]), *_box(parent))
        return Icon(
            name,
            entry["body"],
            float(entry.get("left", 0)),
            float(entry.get("top", 0)),
            float(entry.get("width", width)),
            float(entry.get("height", height)),
        )

    return {name: resolve(name) for name in (*icon_set["icons"], *aliases)}


def _box(icon: Icon) -> tuple[float, float, float, float]:
    return icon.left, icon.top, icon.width, icon.height


def _transform(icon: Icon, alias: Mapping[str, Any]) -> str:
    centre_x, centre_y = icon.left + icon.width / 2, icon.top + icon.height / 2
    steps = []
    if alias.get("rotate"):
        steps.append(f"rotate({90 * alias['rotate']} {centre_x:g} {centre_y:g})")
    if alias.get("hFlip"):
        steps.append(f"translate({2 * centre_x:g} 0) scale(-1 1)")
    if alias.get("vFlip"):
        steps.append(f"translate(0 {2 * centre_y:g}) scale(1 -1)")
    return f'<g transform="{" ".join(steps)}">{icon.body}</g>' if steps else icon.body


class NameIndex:
    """Name -> concept key. Earlier sources win; a name two emoji share in one source is dropped."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def add_source(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Adds (name, key) pairs of one source."""
        found: dict[str, set[str]] = {}
        for name, key in pairs:
            found.setdefault(slug(name), set()).add(key)
        for name, keys in found.items():
            if name and len(keys) == 1:
                self._keys.setdefault(name, next(iter(keys)))

    def find(self, name: str) -> str | None:
        """The key that `name` means, or None."""
        return self._keys.get(slug(name))


def keys_of_chars(icon_set: Mapping[str, Any], chars: Mapping[str, str]) -> list[tuple[str, str]]:
    """(icon name, key) pairs of a set with a `chars.json`; plain aliases share their parent's."""
    pairs = [(name, normalise_key(code)) for code, name in chars.items()]
    keys = dict(pairs)
    for alias, entry in icon_set.get("aliases", {}).items():
        if alias not in keys and entry["parent"] in keys and set(entry) == {"parent"}:
            pairs.append((alias, keys[entry["parent"]]))
    return pairs


def build_name_index(
    concepts: Sequence[Concept],
    unicode_names: Mapping[str, str],
    named_sets: Iterable[tuple[Mapping[str, Any], Mapping[str, str]]],
) -> NameIndex:
    """Index over emojibase labels, then each set's own names, Unicode's names, shortcodes.

    `unicode_names` is `meta/unicode-names.json`; `named_sets` are (icons.json, chars.json) pairs.
    """
    known = {c.key for c in concepts}
    index = NameIndex()
    index.add_source((c.label, c.key) for c in concepts)
    for icon_set, chars in named_sets:
        index.add_source(p for p in keys_of_chars(icon_set, chars) if p[1] in known)
    index.add_source(
        (name, normalise_key(code))
        for code, name in unicode_names.items()
        if normalise_key(code) in known
    )
    index.add_source((code, c.key) for c in concepts for code in c.shortcodes)
    return index


def match_icons(
    concepts: Sequence[Concept],
    icon_set: Mapping[str, Any],
    chars: Mapping[str, str],
    index: NameIndex,
) -> dict[str, Icon]:
    """Concept key -> icon, for the concepts this set draws; by `chars`, or by name if it is empty.

    Real icons come before aliases, so that a concept shown by both keeps its own drawing.
    """
    icons = read_icons(icon_set)
    known = {c.key for c in concepts}
    matched: dict[str, Icon] = {}
    if chars:
        for code, name in chars.items():
            key = normalise_key(code)
            if key in known and name in icons:
                matched.setdefault(key, icons[name])
    else:
        for name, icon in icons.items():
            key = index.find(name)
            if key is not None:
                matched.setdefault(key, icon)
    return {c.key: matched[c.key] for c in concepts if c.key in matched}
