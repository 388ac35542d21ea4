"""What is held out, drawn by hashes of code points so that no order or library version matters.

The drawn lists are committed (`heldout_families.txt`, `heldout_combinations.txt`) and are what a
build uses; a build whose concepts would draw other lists stops instead of moving the boundary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.data.concepts import Concept
from training.data.packages import HELDOUT_STYLE

FAMILY_RATE = 0.125
COMBINATION_RATE = 0.15
# A larger family ("person" in all hair styles, couples in all pairs of tones) would alone make up
# much of a hold-out.
LARGEST_FAMILY = 60

FAMILIES_FILE = Path(__file__).with_name("heldout_families.txt")
COMBINATIONS_FILE = Path(__file__).with_name("heldout_combinations.txt")

TRAIN = "train"
HELDOUT_CONCEPT = "heldout_concept"
HELDOUT_COMBINATION = "heldout_combination"
HELDOUT_STYLE_SPLIT = "heldout_style"
SPLITS = (TRAIN, HELDOUT_CONCEPT, HELDOUT_COMBINATION, HELDOUT_STYLE_SPLIT)


@dataclass(frozen=True)
class HeldOut:
    """Family keys and "family|gender|skin" combinations that no training image may show."""

    families: frozenset[str]
    combinations: frozenset[str]

    def concept(self, concept: Concept) -> bool:
        """Whether the concept's family is held out."""
        return concept.family in self.families

    def combination(self, concept: Concept) -> bool:
        """Whether the concept's (family, gender, skin) is held out."""
        return concept.combination in self.combinations

    def split(self, concept: Concept, style: str) -> str:
        """The split of an image of `concept` in `style`, one of SPLITS."""
        if style == HELDOUT_STYLE:
            return HELDOUT_STYLE_SPLIT
        if self.concept(concept):
            return HELDOUT_CONCEPT
        return HELDOUT_COMBINATION if self.combination(concept) else TRAIN


def fraction(kind: str, text: str) -> float:
    """A number in [0, 1) that only the text decides: 52 bits of SHA-256 of `kind:text`."""
    digest = hashlib.sha256(f"{kind}:{text}".encode()).hexdigest()
    return int(digest[:13], 16) / 16**13


def draw(concepts: Sequence[Concept]) -> HeldOut:
    """Families at FAMILY_RATE; among the rest, toned combinations at COMBINATION_RATE."""
    sizes = Counter(c.family for c in concepts)
    families = frozenset(
        family
        for family, size in sizes.items()
        if size <= LARGEST_FAMILY and fraction("family", family) < FAMILY_RATE
    )
    combinations = frozenset(
        c.combination
        for c in concepts
        if c.skin != "none"
        and c.family not in families
        and fraction("combination", c.combination) < COMBINATION_RATE
    )
    return HeldOut(families, combinations)


def _read_first_column(path: Path) -> frozenset[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


def read(families: Path = FAMILIES_FILE, combinations: Path = COMBINATIONS_FILE) -> HeldOut:
    """The committed lists."""
    return HeldOut(_read_first_column(families), _read_first_column(combinations))


def write(
    held_out: HeldOut,
    concepts: Iterable[Concept],
    families: Path = FAMILIES_FILE,
    combinations: Path = COMBINATIONS_FILE,
) -> None:
    """Writes both lists sorted, each line with the family's name for a human reader."""
    names = {c.family: c.name for c in concepts}
    rows = [f"{family}  {names[family]}" for family in sorted(held_out.families)]
    head = "# Families never trained on, in any style: code points, name.\n"
    families.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    rows = [
        f"{combination}  {names[combination.split('|')[0]]}"
        for combination in sorted(held_out.combinations)
    ]
    head = "# Combinations never trained on, in any style: family|gender|skin, name.\n"
    combinations.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
