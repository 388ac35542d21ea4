"""A data set of a few concepts, made in memory: enough to draw training batches from."""

from __future__ import annotations

from itertools import product

import numpy as np

from training.data.concepts import Concept
from training.data.emoji import EmojiData
from training.data.splits import SPLITS

STYLES = ["noto", "openmoji"]


def concept(name: str, order: int, **attributes: str) -> Concept:
    gender, skin = attributes.get("gender", "none"), attributes.get("skin", "none")
    who = f"{gender} {name}" if gender in ("man", "woman") else name
    label = who if skin == "none" else f"{who}: {skin} skin tone"
    return Concept(
        key=f"{order:x}",
        hexcode=f"{order:X}",
        emoji="x",
        label=label,
        name=name,
        tags=("cat", "face", name),
        shortcodes=(name.replace(" ", "_"),),
        group="people-body" if gender != "none" else "animals-nature",
        subgroup="person-role" if gender != "none" else "animal-mammal",
        base=f"{order:x}",
        family=name,
        gender=gender,
        skin=skin,
        hair="none",
        direction="none",
        tones=(),
        multi_person=False,
        order=order,
    )


def emoji_data(side: int = 112) -> EmojiData:
    """Two families of six variants and four animals, in two styles, all for training."""
    people = [
        concept(name, 16 * f + i, gender=gender, skin=skin)
        for f, name in enumerate(("judge", "artist"))
        for i, (gender, skin) in enumerate(
            product(("person", "man", "woman"), ("none", "dark")),
        )
    ]
    animals = [concept(n, 64 + i) for i, n in enumerate(("cow", "dog", "fox", "owl"))]
    concepts = people + animals
    pairs = list(product(range(len(STYLES)), range(len(concepts))))
    rng = np.random.default_rng(0)
    n = len(pairs)
    return EmojiData(
        images=rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        styles=STYLES,
        concepts=concepts,
        concept_index={c.key: i for i, c in enumerate(concepts)},
        style_ids=np.array([s for s, _ in pairs], np.int32),
        concept_ids=np.array([c for _, c in pairs], np.int32),
        variants=np.zeros(n, np.int32),
        masks={split: np.full(n, split == "train") for split in SPLITS},
        heldout_concept=np.zeros(n, bool),
        heldout_combination=np.zeros(n, bool),
        manifest={},
    )
