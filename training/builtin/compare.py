"""Are these models better than those? Two evaluations, query by query.

    python -m training.builtin.compare before/ranks.json after/ranks.json

Reads what `training.builtin.evaluate --ranks` wrote for each. Every query is in both, so its own
difficulty cancels: intervals are bootstrap over queries, p is a paired randomisation test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from training.configuration import ended
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError
from tte_jax.evaluation.significance import Difference, Interval, compare, interval_of_tasks

NAMED = "reasoning names it"
METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hit@1": lambda rank: (rank < 1).astype(np.float64),
    "hit@10": lambda rank: (rank < 10).astype(np.float64),
    "mrr@50": lambda rank: np.where(rank < 50, 1.0 / (rank + 1.0), 0.0),
}


@dataclass(frozen=True)
class Config:
    """Options: the two files, and the measures to print."""

    before: Annotated[Path, tyro.conf.Positional]
    after: Annotated[Path, tyro.conf.Positional]
    metrics: tuple[str, ...] = ("hit@1", "hit@10")


@dataclass(frozen=True)
class Scores:
    """Per-query scores [Q] of both evaluations."""

    before: np.ndarray
    after: np.ndarray

    @property
    def difference(self) -> Difference:
        return compare(self.before, self.after)


def read(path: Path) -> dict[str, Any]:
    """Raises NotFoundError, DataLossError."""
    try:
        found = json.loads(path.read_text())
        return {"models": found["models"], "tasks": found["tasks"]}
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no {path}; `python -m training.builtin.evaluate --ranks {path}` writes it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataLossError(
            f"{path} is not what `training.builtin.evaluate --ranks` writes (its --out is another"
            " file)",
            path=path,
        ) from None


def paired(before: dict[str, Any], after: dict[str, Any], metric: str) -> dict[str, list[Scores]]:
    """For each arm of both, and for the reasonings, the scores of every task, in order.

    Raises InvalidInputError when the two asked different questions, or for an unknown metric.
    """
    if metric not in METRICS:
        raise InvalidInputError(
            f"no measure is called {metric!r}; there are {', '.join(METRICS)}", field="metrics"
        )
    score = METRICS[metric]
    if list(before["tasks"]) != list(after["tasks"]):
        raise InvalidInputError(
            f"the evaluations have other tasks: {', '.join(before['tasks'])} against "
            f"{', '.join(after['tasks'])}",
            reason="UNPAIRED",
        )
    found: dict[str, list[Scores]] = {}
    for name, one in before["tasks"].items():
        other = after["tasks"][name]
        if (one["answers"], one["pool"]) != (other["answers"], other["pool"]):
            raise InvalidInputError(
                f"{name}: the evaluations asked other queries ({len(one['answers'])} against "
                f"{len(other['answers'])}), or in other pools ({one['pool']} against "
                f"{other['pool']}); give both the same options",
                reason="UNPAIRED",
            )
        for arm in one["ranks"]:
            if arm in other["ranks"]:
                ranks = (np.array(one["ranks"][arm]), np.array(other["ranks"][arm]))
                found.setdefault(arm, []).append(Scores(*(score(r) for r in ranks)))
        named = (np.array(x["named"], np.float64) for x in (one, other))
        found.setdefault(NAMED, []).append(Scores(*named))
    return found


def over_tasks(scores: list[Scores]) -> Interval:
    """The mean difference over tasks, each task's queries resampled for themselves."""
    return interval_of_tasks([s.after - s.before for s in scores])


def table(before: dict[str, Any], after: dict[str, Any], metric: str) -> list[str]:
    """Lines of one measure: each task and arm, and each arm over all tasks."""
    lines = [f"{metric}: before → after, difference (95 %), p, better/worse"]
    arms, names = paired(before, after, metric), list(before["tasks"])
    for number, name in enumerate(names):
        lines.append(f"  {name} ({len(before['tasks'][name]['answers'])} queries)")
        for arm, scores in arms.items():
            one = scores[number]
            d = one.difference
            lines.append(
                f"    {arm:18} {one.before.mean():.3f} → {one.after.mean():.3f}"
                f"  {d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
                f"  p {d.p:.3f}  {d.wins}/{d.losses}"
            )
    lines.append("  mean over tasks")
    for arm, scores in arms.items():
        mean = over_tasks(scores)
        values = [float(np.mean([x.mean() for x in side])) for side in _sides(scores)]
        lines.append(
            f"    {arm:18} {values[0]:.3f} → {values[1]:.3f}"
            f"  {mean.mean:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"
        )
    return lines


def _sides(scores: list[Scores]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [s.before for s in scores], [s.after for s in scores]


def main(config: Config) -> int:
    """Prints it; returns the exit code of `tte_jax.cli.exits`."""

    def work() -> None:
        before, after = read(config.before), read(config.after)
        for name, found in (("before", before), ("after", after)):
            print(f"{name}: {', '.join(str(v) for v in found['models'].values())}")
        for metric in config.metrics:
            print("\n".join(["", *table(before, after, metric)]))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
