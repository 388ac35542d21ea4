"""Which training images a step sees: balanced over families, concepts and art styles."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from training.data.concepts import Concept
from training.data.emoji import EmojiData
from training.data.restyle import colour_matters

_DIRECTIONAL = re.compile(
    r"\b(left|right|leftward|rightward|leftwards|rightwards|clockwise|anticlockwise|"
    r"counterclockwise|arrow|arrows|east|west|north|south|button|symbol|input|keycap|mark|"
    r"letter|flag|o’clock|thirty|quarter|facing|back|end|soon|top|on!)\b",
    re.IGNORECASE,
)


def mirror_safe(concept: Concept) -> bool:
    """Whether the mirror image still shows the concept: no arrows, letters, clocks or flags."""
    texts = (concept.label, concept.direction, concept.group)
    return concept.group not in ("symbols", "flags") and not any(
        _DIRECTIONAL.search(t) for t in texts if t
    )


@dataclass(frozen=True)
class ImageTable:
    """Training image rows by concept and style.

    Attributes:
      concepts: [n] int32 concept ids that have at least one training image.
      family: [n] int32 dense family id of each of them.
      weights: [n] float64 sampling weights, sum 1: every family counts with the square root of its
        size, every concept of a family alike.
      rows: for each concept, a list over styles of arrays of image rows (originals and restyled).
    """

    concepts: np.ndarray
    family: np.ndarray
    weights: np.ndarray
    rows: list[list[np.ndarray]]


def image_table(data: EmojiData, split: str = "train") -> ImageTable:
    """Group the images of a split."""
    selected = data.rows(split)
    grouped: dict[int, dict[int, list[int]]] = {}
    for row in selected:
        by_style = grouped.setdefault(int(data.concept_ids[row]), {})
        by_style.setdefault(int(data.style_ids[row]), []).append(int(row))
    concepts = np.array(sorted(grouped), np.int32)
    names = [data.concepts[c].family for c in concepts]
    family = np.unique(names, return_inverse=True)[1].astype(np.int32)
    size = np.bincount(family)[family]
    weights = size.astype(np.float64) ** -0.5
    rows = [[np.array(r) for r in grouped[int(c)].values()] for c in concepts]
    return ImageTable(concepts, family, weights / weights.sum(), rows)


def pick_row(table: ImageTable, index: int, rng: np.random.Generator) -> int:
    """One image of a concept: a style at random, then the original or a restyled drawing."""
    styles = table.rows[index]
    rows = styles[rng.integers(len(styles))]
    return int(rows[0] if rng.random() < 0.4 else rows[rng.integers(len(rows))])


@dataclass(frozen=True)
class ColourRules:
    """Per concept id: leave colours nearly alone; may be mirrored. Both bool [concepts]."""

    gentle: np.ndarray
    may_flip: np.ndarray


def colour_rules(data: EmojiData) -> ColourRules:
    return ColourRules(
        gentle=np.array([colour_matters(c) for c in data.concepts]),
        may_flip=np.array([mirror_safe(c) for c in data.concepts]),
    )
