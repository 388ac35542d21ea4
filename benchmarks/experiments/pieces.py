"""Runs one task under one reasoner's arms, and keeps what came of every query.

A piece is a file `REASONER/TASK/ARM.json`; what is there is not run again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.stages import Noted
from benchmarks.experiments.tasks import Case
from tte_jax.errors import DataLossError
from tte_jax.evaluation.arms import Arm, Ecr
from tte_jax.evaluation.runner import Answer, ArmResult, Settings, Stages, TaskRunner

CONCURRENCY = 16
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kept:
    """Where pieces are kept."""

    folder: Path

    def path(self, reasoner: str, task: str, arm: str) -> Path:
        return self.folder / reasoner / task / f"{arm}.json"

    def has(self, reasoner: str, task: str, arm: str) -> bool:
        return self.path(reasoner, task, arm).is_file()

    def lacks(self, reasoner: str, task: str, arms: Sequence[Arm]) -> list[Arm]:
        return [arm for arm in arms if not self.has(reasoner, task, arm.name)]

    def read(self, reasoner: str, task: str, arm: str) -> dict[str, Any]:
        """Raises DataLossError for a file that cannot be read."""
        path = self.path(reasoner, task, arm)
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataLossError(
                f"{path} cannot be read ({error}); delete it and run the experiments again.",
                reason="UNREADABLE_RESULTS",
            ) from error

    def write(self, reasoner: str, task: str, arm: str, piece: dict[str, Any]) -> None:
        path = self.path(reasoner, task, arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(piece, ensure_ascii=False) + "\n", "utf-8")
        part.replace(path)


async def run(
    kept: Kept, reasoner: str, case: Case, arms: Sequence[Arm], stages: Stages, say: Say = print
) -> None:
    """Runs `arms`, one after the other, each kept as soon as it is done."""
    name = case.task.name
    noted = Noted(stages.reasoner)
    runner = TaskRunner(
        case.task, replace(stages, reasoner=noted), Settings(concurrency=CONCURRENCY)
    )
    began = time.monotonic()
    async for result in runner.run(arms):
        seconds, began = time.monotonic() - began, time.monotonic()
        piece = record(result, case, noted, seconds=seconds)
        kept.write(reasoner, name, result.arm.name, piece)
        hits = sum(rank == 0 for rank in piece["ranks"]) / len(piece["ranks"])
        say(f"{reasoner}, {name}, {result.arm.name}: hit@1 {100 * hits:.1f}, {seconds:.0f} s")


def record(result: ArmResult, case: Case, noted: Noted, *, seconds: float) -> dict[str, Any]:
    """What is kept of an arm: of every query, in the task's order,

    ranks: of the right candidate, from 0; null when it was not ranked.
    right: whether the answer of the query's ECR is the true one.
    target_right: likewise of the ECR of the right candidate.
    cut: whether the budget closed the thinking.
    tokens: generated ones, rewrites included.

    and of the candidates the share whose answer is right. Without ECRs these are null.
    """
    arm, answers = result.arm, result.answers
    documents = _documents(result, case, noted)
    reasons = arm.ecr is not Ecr.NONE and arm.tokens > 0
    return {
        "ranks": [_rank(answer) for answer in answers],
        "right": [same(a.reasoning.answer, case.answers[a.query.id]) for a in answers]
        if reasons
        else None,
        "target_right": [documents[a.query.label[0]] for a in answers] if documents else None,
        "cut": [a.reasoning.truncated for a in answers] if reasons else None,
        "tokens": [sum(usage.tokens_out for usage in a.usage) for a in answers],
        "documents_right": sum(documents.values()) / len(documents) if documents else None,
        "pool": result.pool,
        "candidates_failed": sum(result.failed.values()),
        "queries_failed": sum(bool(a.error) for a in answers),
        "degraded": dict(Counter(d for a in answers for d in a.degraded)),
        "seconds": round(seconds, 1),
    }


def same(answer: str, truth: str) -> bool:
    """Whether an answer line names the thing; case and spaces do not count."""
    return " ".join(answer.lower().split()) == " ".join(truth.lower().split())


def _rank(answer: Answer) -> int | None:
    right = answer.query.label[0]
    ranking = answer.ranked.prediction
    return ranking.index(right) if right in ranking else None


def _documents(result: ArmResult, case: Case, noted: Noted) -> dict[str, bool]:
    """Candidate → whether its answer is right; {} of an arm whose candidates have no ECR."""
    if result.arm.ecr is Ecr.NONE:
        return {}
    found: dict[str, bool] = {}
    for item in case.task.candidates():
        key = (item.load().content_hash, result.arm.candidate_tokens)
        if key in noted.answers:
            found[item.name] = same(noted.answers[key], case.answers[item.name])
    return found
