"""The run behind `tte eval mmeb-v2`: opens the models, goes over tasks and arms, writes results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from tte_jax.cli import inspection, launch, state
from tte_jax.cli.connection import addresses
from tte_jax.cli.output import Output
from tte_jax.cli.progress import bar
from tte_jax.errors import (
    DataLossError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from tte_jax.evaluation import outputs
from tte_jax.evaluation.arms import Arm
from tte_jax.evaluation.metrics import Mode
from tte_jax.evaluation.mini.workshop import sha256
from tte_jax.evaluation.mmeb_v2.load import Instructions, load
from tte_jax.evaluation.mmeb_v2.registry import ALIASES, DatasetInfo
from tte_jax.evaluation.reasoners import Cached, Recorded
from tte_jax.evaluation.runner import Progress, Settings, Stages, TaskRunner
from tte_jax.evaluation.task import EvalTask

# A task's own fault; the other tasks still run.
_TASK_ERRORS = (InvalidInputError, DataLossError, NotFoundError, UnsupportedError)
# How long a service may take to say what it runs.
INFO_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What is to be run; the fields are the command's flags.

    Attributes:
      instructions_from: which wording, for the settings.
      made: what the data are of tasks that were built here, for the settings; task → anything.
    """

    infos: Sequence[DatasetInfo]
    data: Path
    out: Path
    arms: Sequence[Arm]
    mode: Mode
    limit: int
    frames: int
    both_sides: bool
    concurrency: int
    overwrite: bool
    instructions: Instructions
    instructions_from: str
    ecrs: Path | None
    rankings: Path | None
    models: list[str] | None
    services: bool
    made: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, about: dict[str, Any]) -> dict[str, Any]:
        """What results depend on; kept with them, so that a later run can tell."""
        return {
            "models": about,
            "limit": self.limit,
            "frames": self.frames,
            "page_fix": True,
            "both_sides": self.both_sides,
            "metric_mode": str(self.mode),
            "concurrency": self.concurrency,
            "instructions": self.instructions_from,
            "ecrs": f"sha256:{sha256(self.ecrs)}" if self.ecrs else "",
            "first_stage": "embedder",
            "deadline": "none",
        }

    def task_settings(self, info: DatasetInfo) -> dict[str, Any]:
        """What the results of one task depend on besides. Raises NotFoundError for a task without
        rankings when they are to be the first stage."""
        found: dict[str, Any] = {}
        if self.rankings is not None:
            found["first_stage"] = f"sha256:{sha256(_prediction_file(self.rankings, info))}"
        if info.name in self.made:
            found["data"] = self.made[info.name]
        return found


async def run(plan: Plan, out: Output) -> dict[str, str]:
    """Runs what is not done yet; returns the tasks that could not be run, with the reason."""
    failed: dict[str, str] = {}
    async with open_stages(plan, out) as stages:
        settings = plan.settings(dict(stages.about))
        for info in plan.infos:
            try:
                await _run(plan, info, stages, settings | plan.task_settings(info), out)
            except _TASK_ERRORS as error:
                if error.reason == "OTHER_SETTINGS":  # the other tasks would say the same
                    raise
                failed[info.name] = error.message
                out.err.print(f"[red]{info.name} failed:[/] {escape(error.message)}")
    return failed


async def _run(
    plan: Plan, info: DatasetInfo, stages: Stages, settings: dict[str, Any], out: Output
) -> None:
    arms = [arm for arm in plan.arms if not _done(plan, info, arm, settings)]
    if not arms:
        out.note(f"{info.name}: done before")
        return
    task = load(
        info, plan.data, limit=plan.limit, frames=plan.frames, instructions=plan.instructions
    )
    await run_task(plan, task, info, arms, stages, settings, out)


async def run_task(
    plan: Plan,
    task: EvalTask,
    info: DatasetInfo,
    arms: Sequence[Arm],
    stages: Stages,
    settings: dict[str, Any],
    out: Output,
) -> None:
    """One task under its arms, with a progress bar each; results are written as they come."""
    rankings = None
    if plan.rankings is not None:
        rankings = outputs.read_predictions(_prediction_file(plan.rankings, info), info.name)
        # As with the queries, the first so many count.
        rankings = rankings[: plan.limit] if plan.limit else rankings
    with bars(task.name, out) as progress:
        runner = TaskRunner(
            task,
            stages,
            Settings(concurrency=plan.concurrency, both_sides=plan.both_sides),
            progress=progress,
            rankings=rankings,
        )
        async for result in runner.run(arms):
            folder = plan.out / result.arm.name
            about = outputs.write(folder, result, mode=plan.mode, settings=settings)
            interval = about["interval"]
            lacks = "".join(f"; {what}: {n}" for what, n in outputs.lacks(about).items())
            for side, (recorded, asked) in result.recorded.items():
                lacks += f"; ECRs recorded, {side}: {recorded} of {asked}"
            out.note(
                f"{task.name}, {result.arm.name}: {task.metric} {100 * about['score']:.2f} "
                f"({100 * interval['low']:.1f} to {100 * interval['high']:.1f}), "
                f"{about['tokens_per_query']:.1f} tokens and "
                f"{about['seconds_per_query']['mean']:.3f} s a query{lacks}"
            )


def _done(plan: Plan, info: DatasetInfo, arm: Arm, settings: dict[str, Any]) -> bool:
    if plan.overwrite:
        return False
    return outputs.done(plan.out / arm.name, info.name, str(info.modality), settings)


def _prediction_file(rankings: Path, info: DatasetInfo) -> Path:
    """A task's `_pred.jsonl` of another system, under any of its names."""
    names = [info.name, *(alias for alias, name in ALIASES.items() if name == info.name)]
    for name in names:
        for folder in (rankings, rankings / info.modality):
            path = folder / f"{name}_pred.jsonl"
            if path.is_file():
                return path
    raise NotFoundError(
        f"{rankings} has no {info.name}_pred.jsonl, by itself or in {info.modality}/.",
        reason="FILE_NOT_FOUND",
    )


@contextlib.contextmanager
def bars(name: str, out: Output) -> Iterator[Progress]:
    """One bar at a time: the candidates', then each arm's."""
    with contextlib.ExitStack() as stack:
        shown, update = "", None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal shown, update
            if what != shown or update is None:
                stack.close()
                shown = what
                update = stack.enter_context(bar(f"{name}, {what}", total or None, out))
            update(done)

        yield progress


@contextlib.asynccontextmanager
async def open_stages(plan: Plan, out: Output) -> AsyncIterator[Stages]:
    """The models, warm, in this process or as running services; closed at the end."""
    recorded = Recorded(plan.ecrs) if plan.ecrs else None
    cache = plan.out / "reasonings.jsonl"
    if plan.services:
        from tte_jax.client import RemoteEmbedder, RemoteReasoner, RemoteReranker

        where = addresses()
        about = await asyncio.to_thread(versions, where)
        remote = (
            RemoteReasoner(where["reasoner"]),
            RemoteEmbedder(where["embedder"]),
            RemoteReranker(where["reranker"]),
        )
        try:
            reasoner = recorded or Cached(remote[0], cache, models=about["reasoner"]["version"])
            yield Stages(reasoner, remote[1], remote[2], about, recorded)
        finally:
            for stage in remote:
                await stage.close()
        return
    from tte_jax.embedder import Embedder
    from tte_jax.engine.executables import enable_compile_cache
    from tte_jax.local import LocalEmbedder, LocalReasoner, LocalReranker
    from tte_jax.reasoner import Reasoner
    from tte_jax.reranker import Reranker

    given = os.environ.get("TTE_DATA_DIR")
    enable_compile_cache(state.data_dir(Path(given) if given else None) / "compile-cache")
    flags = [flag.removeprefix("--").partition("=") for flag in launch.model_flags(plan.models)]
    paths = {flag.removesuffix("-model"): Path(path) for flag, _, path in flags}
    with (
        Reasoner.from_pretrained(paths["reasoner"]) as one,
        Embedder.from_pretrained(paths["embedder"]) as two,
        Reranker.from_pretrained(paths["reranker"]) as three,
    ):
        about = {
            role.name: {"version": role.version, "parameters": parameters(paths[role.name])}
            for role in (one, two, three)
        }
        # Before anything is measured; what no arm uses is not compiled.
        reasons = recorded is None and any(arm.tokens or arm.rewrites for arm in plan.arms)
        used = [(two, True), (one, reasons), (three, any(arm.depth for arm in plan.arms))]
        for role in (role for role, wanted in used if wanted):
            out.note(f"Warming up the {role.name}")
            await asyncio.to_thread(role.warmup)
        local = LocalReasoner(one)
        reasoner = recorded or Cached(local, cache, models=one.version)
        yield Stages(reasoner, LocalEmbedder(two), LocalReranker(three), about, recorded)


def versions(where: Mapping[str, str]) -> dict[str, Any]:
    """Role → what runs there: addresses change from start to start, and models do at one address.

    Raises UnavailableError for a service that does not say what it runs.
    """
    roles = ("reasoner", "embedder", "reranker")
    found = inspection.look({role: where[role] for role in roles}, timeout_s=INFO_S)
    for seen in found:
        if not seen.about.get("model_version"):
            raise UnavailableError(
                f"--services: the {seen.service} at {seen.address} ({seen.health}) does not say "
                "which model it runs; expected all three to be up.",
            )
    return {s.service: {"version": s.about["model_version"], "service": True} for s in found}


def parameters(directory: Path) -> int:
    """How many numbers a model directory's safetensors files hold, by their headers."""
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(t["shape"]) for n, t in header.items() if n != "__metadata__")
    return total
