"""Short runs of the contrastive trainer from one start that differ in their negatives alone, and
what comes out on held-out data, query by query."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from training import contrastive
from training.batches import Packing
from training.builtin.heldout import HeldOut
from training.data.ecrs import EcrStore
from training.data.rows import ExampleSource
from training.optimiser import Optimiser
from training.sequences import Counts
from tte_jax.builtin import models
from tte_jax.embedder import Embedder
from tte_jax.evaluation import significance


@dataclass(frozen=True)
class Recipe:
    """How every run trains.

    Attributes:
      steps, batch: of the run; a batch is of one data set.
      negatives: of each query, at most.
      lr: the highest rate, of AdamW with a cosine.
    """

    steps: int = 60
    batch: int = 32
    negatives: int = 4
    lr: float = 2e-4
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class ShortRuns:
    """Where runs begin, what they are asked, and where their ranks are kept.

    Attributes:
      start: model directory that every run begins with.
      data: the source's name, for the order of the examples.
      heldout, store: the questions and everybody's ECRs.
      work: ranks of each finished run lie here, and are not made again.
    """

    start: Path
    data: str
    heldout: HeldOut
    store: EcrStore
    work: Path
    recipe: Recipe = field(default_factory=Recipe)

    def ranks(self, name: str, source: ExampleSource, *, count: int, seed: int) -> Any:
        """{task: [Q] ranks} of a run on a source; `count` negatives of each query are read.

        Returns None when the run was stopped by a signal; the same call goes on later.
        """
        kept = self.work / f"{name}-{seed}.npz"
        if not kept.exists():
            begun, out = time.monotonic(), self.work / f"{name}-{seed}"
            exported = contrastive.main(self._config(out, count, seed), examples=source)
            if exported is None:
                return None
            trained = time.monotonic() - begun
            self._ask(exported, kept, trained)
            shutil.rmtree(out)
            print(f"{kept.stem}: trained in {trained:.0f} s", file=sys.stderr, flush=True)
        return _read(kept)

    def ranks_before(self) -> Any:
        """As `ranks`, of the start."""
        kept = self.work / "start.npz"
        if not kept.exists():
            self._ask(self.start, kept, 0.0)
        return _read(kept)

    def seconds(self, name: str, seed: int) -> float:
        """How long a finished run trained."""
        with np.load(self.work / f"{name}-{seed}.npz") as kept:
            return float(kept["seconds"])

    def _ask(self, model: Path, kept: Path, seconds: float) -> None:
        with Embedder.from_pretrained(model) as embedder:
            found = self.heldout.ranks(embedder, self.store)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part.npz")
        arrays: dict[str, Any] = {str(i): found[name] for i, name in enumerate(self.heldout.tasks)}
        np.savez(part, seconds=np.float64(seconds), **arrays)
        part.rename(kept)

    def _config(self, out: Path, count: int, seed: int) -> contrastive.Config:
        recipe = self.recipe
        return replace(
            contrastive.PRESETS["builtin"],
            model=str(self.start),
            data=(self.data,),
            out=out,
            steps=recipe.steps,
            global_batch=recipe.batch,
            sub_batch=recipe.batch,
            counts=Counts(1, count),
            packing=Packing(lengths=(128,), tokens=1024, slots=8, patches=64),
            optimiser=Optimiser(lr=recipe.lr, schedule="cosine", weight_decay=0.01),
            no_ecr=0.0,
            grad_cache=True,
            seed=seed,
            checkpoint_every=recipe.steps,
            keep_last=1,
        )


def start_of(model: str) -> Path:
    return Path(models.resolve(model))


def _read(kept: Path) -> dict[str, np.ndarray]:
    """By number of the task, in the order of `HeldOut.tasks`."""
    with np.load(kept) as found:
        return {name: found[name] for name in found.files if name != "seconds"}


def scores(ranks: Mapping[str, np.ndarray], metric: str) -> list[np.ndarray]:
    """Per query, by task: "hit@1" or "mrr"."""
    if metric == "hit@1":
        return [(rank < 1).astype(float) for rank in ranks.values()]
    return [1.0 / (1.0 + rank) for rank in ranks.values()]


def summary(runs: Sequence[Mapping[str, np.ndarray]], tasks: Sequence[str]) -> dict[str, Any]:
    """Mean over tasks of hit@1 and MRR: mean and spread (standard deviation) over the seeds."""
    made: dict[str, Any] = {}
    for metric in ("hit@1", "mrr"):
        by_task = np.array([[s.mean() for s in scores(run, metric)] for run in runs])
        means = by_task.mean(1)
        made[metric] = {
            "mean": float(means.mean()),
            "spread": float(means.std(ddof=1)) if len(means) > 1 else 0.0,
            "seeds": means.tolist(),
            "tasks": dict(zip(tasks, by_task.mean(0).tolist(), strict=True)),
        }
    return made


def difference(
    a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]], metric: str
) -> dict[str, Any]:
    """`b` minus `a`, paired by seed and query: all queries of all tasks count alike.

    "holds": the interval over queries excludes 0, and every seed has the same sign.
    """

    def whole(runs: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        return np.stack([np.concatenate(scores(run, metric)) for run in runs])

    one, other = whole(a), whole(b)
    made = significance.compare(one.mean(0), other.mean(0)).as_json()
    seeds = (other - one).mean(1)
    same = bool((seeds > 0).all() or (seeds < 0).all())
    clear = made["low"] > 0 or made["high"] < 0
    verdict = "no difference"
    if clear and same:
        verdict = "better" if made["difference"] > 0 else "worse"
    return {**made, "seeds": seeds.tolist(), "verdict": verdict}
