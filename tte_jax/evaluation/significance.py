"""How sure a figure is: bootstrap intervals, and whether two runs over the same queries differ.

All resampling is of queries, seeded, and therefore the same on every run and machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tte_jax.errors import InvalidInputError

SAMPLES = 2_000
_CHUNK = 4_000_000  # numbers held at once


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Difference:
    """`b` minus `a` over the same queries.

    Attributes:
      difference: of the means; `low`, `high`: its bootstrap interval.
      p: two-sided randomisation test: how often signs by chance give at least this difference.
      wins, losses: queries that `b` does better, and worse.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    queries: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


def interval(scores: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The bootstrap interval of the mean of per-query scores [queries]."""
    means = _means([np.asarray(scores, np.float64)], seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(scores)), float(low), float(high), level)


def interval_of_tasks(
    tasks: Sequence[np.ndarray], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """As `interval` of the plain mean over tasks, each task's queries resampled for themselves."""
    means = _means([np.asarray(t, np.float64) for t in tasks], seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([np.mean(t) for t in tasks]))
    return Interval(mean, float(low), float(high), level)


def compare(a: np.ndarray, b: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Difference:
    """Paired comparison of two runs' per-query scores, in the same order of queries."""
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise InvalidInputError(
            f"Two runs are compared query by query, and these have {a.size} and {b.size} queries; "
            "compare runs over the same tasks and the same --limit.",
            field="queries",
            reason="UNPAIRED",
        )
    d = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    means = _means([d], seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    rng = np.random.default_rng(seed + 1)
    observed, reached, done = abs(d.mean()) - 1e-12, 0, 0
    while done < SAMPLES:
        count = max(1, min(SAMPLES - done, _CHUNK // d.size))
        signs = rng.integers(0, 2, (count, d.size), np.int8) * 2 - 1
        reached += int((np.abs(signs @ d / d.size) >= observed).sum())
        done += count
    return Difference(
        difference=float(d.mean()),
        low=float(low),
        high=float(high),
        p=(reached + 1) / (SAMPLES + 1),
        wins=int((d > 0).sum()),
        losses=int((d < 0).sum()),
        queries=d.size,
    )


def _means(tasks: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """[SAMPLES] means over tasks of means over resampled queries."""
    if not tasks or any(not t.size for t in tasks):
        raise InvalidInputError("There are no scores to resample.", field="scores")
    rng = np.random.default_rng(seed)
    total = np.zeros(SAMPLES)
    for task in tasks:
        step = max(1, _CHUNK // task.size)
        for start in range(0, SAMPLES, step):
            rows = min(step, SAMPLES - start)
            drawn = rng.integers(0, task.size, (rows, task.size))
            total[start : start + rows] += task[drawn].mean(1)
    return total / len(tasks)
