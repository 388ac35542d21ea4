"""What is said about the pieces: means with intervals, and paired differences.

Quality is hit@1, the mean over tasks, each task weighing the same. A comparison is paired, query by
query; its interval is of the mean difference over tasks (bootstrap over queries), at a level that
all comparisons of one experiment hold together at 95 % (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.pieces import Kept
from benchmarks.experiments.plan import EXPERIMENTS, SHIPPED, Comparison, Experiment
from benchmarks.experiments.plan import NONE as WITHOUT
from tte_jax.evaluation import significance

LEVEL = 0.95


def hits(piece: dict[str, Any], k: int = 1) -> np.ndarray:
    """[queries] float64: 1 where the right candidate is among the first k."""
    return np.array([rank is not None and rank < k for rank in piece["ranks"]], np.float64)


def complete(kept: Kept, name: str, tasks: Sequence[str]) -> bool:
    """Whether every piece of an experiment is there."""
    pieces = EXPERIMENTS[name].pieces.values()
    return all(kept.has(piece.reasoner, task, piece.arm) for piece in pieces for task in tasks)


def experiment(kept: Kept, name: str, tasks: Sequence[str]) -> dict[str, Any]:
    """One experiment: its rows, and its comparisons."""
    planned = EXPERIMENTS[name]
    rows = {
        label: row([kept.read(piece.reasoner, task, piece.arm) for task in tasks], tasks)
        for label, piece in planned.pieces.items()
    }
    return {"rows": rows, "comparisons": comparisons(kept, planned, tasks)}


def row(pieces: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """One arm over all tasks, and by task."""
    found = significance.interval_of_tasks([hits(piece) for piece in pieces])
    shares = {key: _mean([_share(p[key]) for p in pieces]) for key in ("right", "cut")}
    documents = _mean([p["documents_right"] for p in pieces])
    return {
        "hit@1": round(found.mean, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "tasks": {name: figures(p) for name, p in zip(tasks, pieces, strict=True)},
        "tokens_per_query": round(float(np.mean([np.mean(p["tokens"]) for p in pieces])), 1),
        "queries_right": shares["right"],
        "documents_right": documents,
        # Of what is compared, half are queries' ECRs and half candidates'.
        "right": _mean([shares["right"], documents]),
        "cut": shares["cut"],
        "not_as_asked": sum(sum(p["degraded"].values()) + p["queries_failed"] for p in pieces),
        "seconds": round(sum(p["seconds"] for p in pieces), 1),
    }


def figures(piece: dict[str, Any]) -> dict[str, Any]:
    """One arm over one task."""
    one = significance.interval(hits(piece))
    ranks = [rank for rank in piece["ranks"] if rank is not None]
    return {
        "hit@1": round(one.mean, 4),
        "interval": [round(one.low, 4), round(one.high, 4)],
        "hit@10": round(float(hits(piece, 10).mean()), 4),
        "mrr": round(sum(1 / (1 + rank) for rank in ranks) / len(piece["ranks"]), 4),
        "queries_right": _share(piece["right"]),
        "documents_right": piece["documents_right"] and round(piece["documents_right"], 4),
        "queries": len(piece["ranks"]),
        "pool": piece["pool"],
    }


def comparisons(kept: Kept, planned: Experiment, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The experiment's comparisons with their intervals."""
    level = 1 - (1 - LEVEL) / max(len(planned.comparisons), 1)
    return [_compared(kept, planned, one, tasks, level) for one in planned.comparisons]


def _compared(
    kept: Kept, planned: Experiment, one: Comparison, tasks: Sequence[str], level: float
) -> dict[str, Any]:
    def scores(label: str) -> list[np.ndarray]:
        piece = planned.pieces[label]
        return [hits(kept.read(piece.reasoner, task, piece.arm)) for task in tasks]

    pairs = list(zip(scores(one.worse), scores(one.better), strict=True))
    by_task = {
        task: significance.compare(a, b).as_json()
        for task, (a, b) in zip(tasks, pairs, strict=True)
    }
    over = significance.interval_of_tasks([b - a for a, b in pairs], level=level)
    return {
        "worse": one.worse,
        "better": one.better,
        "says": one.says,
        "difference": round(over.mean, 4),
        "low": round(over.low, 4),
        "high": round(over.high, 4),
        "level": round(level, 5),
        "tasks": {
            task: {k: round(v, 5) if isinstance(v, float) else v for k, v in d.items()}
            for task, d in by_task.items()
        },
    }


def split(kept: Kept, tasks: Sequence[str], arms: dict[str, str]) -> list[dict[str, Any]]:
    """hit@1 of the shipped reasoner's arms where its answers are right and where they are not.

    Args:
      arms: label → arm, all with the same ECRs; the first decides what is right.

    Returns:
      For each task three rows: right for query and right candidate both, for one of them, for none.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        pieces = {label: kept.read(SHIPPED, task, arm) for label, arm in arms.items()}
        without = hits(kept.read(SHIPPED, task, WITHOUT.name))
        first = next(iter(pieces.values()))
        count = np.array(first["right"], int) + np.array(first["target_right"], int)
        for number, what in ((2, "both"), (1, "one"), (0, "none")):
            here = count == number
            if not here.any():
                continue
            scores = {"bi-encoder": without} | {k: hits(p) for k, p in pieces.items()}
            rows.append(
                {
                    "task": task,
                    "right": what,
                    "queries": int(here.sum()),
                    "hit@1": {k: round(float(v[here].mean()), 4) for k, v in scores.items()},
                }
            )
    return rows


def _share(marks: Sequence[bool] | None) -> float | None:
    return None if marks is None else round(float(np.mean(marks)), 4)


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(float(np.mean(known)), 4) if known else None
