"""Stage 3: what the model itself says, for its embedder to learn how far to trust it.

    python -m training.builtin.own --out .data/runs/own.jsonl

On clean training pictures the reasoner is nearly always right, and an embedder that reads only
such reasonings follows a wrong one blindly. So training pictures are spoilt until the reasoner errs
about as often as on an art style that it never saw, and what it says of them is written down, along
with what it says of text queries and of changes. `training.builtin.unified --own` then shows these
reasonings in place of the true ones. Only training pictures and training concepts are used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from training import builtin
from training.builtin import texts
from training.builtin.evaluate import png
from training.builtin.images import spoil
from training.builtin.pairs import Mix, Own, PairSource
from training.builtin.sampling import image_table, pick_row
from training.data.emoji import load
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.content import Content, Side
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.reasoner import Reasoner
from tte_jax.stages import ReasonItem


@dataclass(frozen=True)
class Config:
    """Options: the model directory, tokenizer included, how much of each kind, how badly pictures
    are spoilt."""

    data: Path = Path(".data/emoji")
    model: Path = WEIGHTS_DIR / REASONER
    out: Path = Path(".data/runs/own.jsonl")
    image: int = 4500
    text: int = 1500
    composed: int = 2500
    strength: float = 0.8
    budget: int = 64
    seed: int = 1


def main(config: Config) -> None:
    data = load(config.data)
    rng = np.random.default_rng(config.seed)
    source = PairSource(
        data, Tokenizer.from_dir(config.model), builtin.IMAGES, prototypes=None, seed=config.seed
    )
    table = image_table(data)

    def drawn(count: int) -> list[int]:
        return [int(i) for i in rng.choice(len(table.concepts), count, p=table.weights)]

    asked = [Own(pick_row(table, i, rng), i, "", "") for i in drawn(config.image)]
    for i in drawn(config.text):
        _, text = source.text_prompt(data.concepts[table.concepts[i]], rng)
        asked.append(Own(-1, i, text, ""))
    asked += source.changes(Mix(composed=config.composed, corrupt=0.0), rng)

    def content(own: Own) -> Content:
        if own.row < 0:
            return Content.of(own.text)
        strength = float(rng.uniform(0.0, config.strength))
        return Content.of(own.text, png(spoil(data.images[own.row], rng, strength)))

    with Reasoner.from_pretrained(config.model) as reasoner:
        items = [ReasonItem(content(own), Side.QUERY) for own in asked]
        said = [r.text for r in reasoner.reason(items, max_tokens=config.budget)]

    lines = []
    for own, ecr in zip(asked, said, strict=True):
        own = own._replace(row=int(own.row), concept=int(table.concepts[own.concept]), ecr=ecr)
        lines.append(json.dumps(own._asdict(), ensure_ascii=False))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = config.out.with_suffix(".partial")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, config.out)

    def right(chosen: Callable[[Own], bool]) -> float:
        answers = [
            ecr.split("Answer:")[-1].strip()
            == texts.label(data.concepts[table.concepts[o.concept]])
            for o, ecr in zip(asked, said, strict=True)
            if chosen(o)
        ]
        return float(np.mean(answers))

    print(
        f"{len(lines)} reasonings in {config.out}; the answer line is right for "
        f"{right(lambda o: o.row >= 0 and not o.text):.1%} of the pictures, "
        f"{right(lambda o: o.row < 0):.1%} of the texts, "
        f"{right(lambda o: o.row >= 0 and bool(o.text)):.1%} of the changes"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
