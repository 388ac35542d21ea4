"""A small data set on the disk and the smallest run over it, for the tests of the trainers."""

from __future__ import annotations

import json
from pathlib import Path

from tests import tiny_models
from training.batches import Packing
from training.contrastive import Config
from training.optimiser import Optimiser
from training.parameters import Tuning
from training.sequences import Counts

ANIMALS = "cat dog owl fox hen bee ant cow elk emu jay yak ram pig rat bat".split()


def write(folder: Path, *, pictures: bool = False, count: int = 16) -> Path:
    """`pairs.jsonl` with a query, an ECR and a document of each animal, and one mined negative."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(ANIMALS[:count]):
        positive: dict[str, object] = {"text": f"a picture of a {name}"}
        if pictures and number % 2 == 0:
            (folder / f"{name}.png").write_bytes(tiny_models.png(number, 28, 28))
            positive = {"images": [f"{name}.png"]}
        other = ANIMALS[(number + 1) % count]
        rows.append(
            {
                "key": name,
                "dataset": "animals",
                "query": {"text": name, "ecr": f"<think>it is a {name}</think>\nAnswer: {name}"},
                "positives": [positive],
                "negatives": [{"text": f"no {other}"}],
                "negative_scores": [0.1],
                "positive_score": 0.9,
            }
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model: Path, pairs: Path, out: Path) -> Config:
    return Config(
        model=str(model),
        data=(f"jsonl:{pairs}",),
        out=out,
        steps=4,
        global_batch=8,
        sub_batch=8,
        counts=Counts(positives=1, negatives=1),
        packing=Packing(lengths=(64,), tokens=256, slots=2, patches=16),
        tuning=Tuning(rank=4, alpha=16),
        optimiser=Optimiser(lr=1e-2),
        temperature=0.1,
        learn_temperature=True,
        dtype="float32",
        remat=False,
        report_every=1,
        checkpoint_every=2,
    )
