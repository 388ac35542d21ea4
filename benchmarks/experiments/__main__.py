"""The papers' experiments in small: budgets, reranking and rewriting, strength of the reasoner.

    make experiments                                          # all, with the default options
    python -m benchmarks.experiments --only budget --limit 100

Held-out queries of the emoji data set go through the cascade that the gateway serves. Each piece (a
task under an arm) is kept under `--work`, so that an interrupted run goes on; the result holds the
experiments whose pieces are all there. At the end the figures and the tables of the pages are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment, tables
from benchmarks.experiments import pieces, plan, summary, tasks
from benchmarks.experiments.stages import Coarse, Oracle, Remembered, Sampled
from training.data import emoji
from tte_jax.builtin.models import EMBEDDER, REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.content import Side
from tte_jax.embedder import Embedder
from tte_jax.engine.executables import enable_compile_cache
from tte_jax.errors import InvalidInputError, TteError
from tte_jax.evaluation.reasoners import Cached
from tte_jax.evaluation.runner import Stages
from tte_jax.local import LocalEmbedder, LocalReasoner, LocalReranker
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import ReasonerStage, Sampling

RESULT = Path("benchmarks/results/experiments.json")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `python -m training.data.emoji`.
      models: folder with the built-in models' directories.
      only: some of the experiments; empty = all.
      limit: queries of each task.
      pool: candidates of each task; 0 = all there are.
      work: pieces, ECRs and compiled programs.
      out: the result; elsewhere than its own place, the pages are left alone.
    """

    data: Path = Path(".data/emoji")
    models: Path = WEIGHTS_DIR
    only: tuple[str, ...] = ()
    limit: int = 300
    pool: int = 0
    work: Path = Path(".tte/experiments")
    out: Path = RESULT
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in plan.EXPERIMENTS]
        if unknown:
            raise InvalidInputError(
                f"--only {' '.join(unknown)}: there are {', '.join(plan.EXPERIMENTS)}.",
                field="--only",
            )
        if self.limit < 2 or self.pool < 0:
            raise InvalidInputError(
                f"--limit is {self.limit} and --pool {self.pool}; expected at least 2 queries, and "
                "0 or more candidates.",
                field="--limit",
            )


class Models:
    """The roles, opened when they are first asked for, closed together."""

    def __init__(self, folder: Path, work: Path, cases: dict[str, tasks.Case]) -> None:
        self.folder, self.work, self.cases = folder, work, cases
        self.open = contextlib.ExitStack()
        self.reasoner = self._role(Reasoner, REASONER)
        self.embedder = self._role(Embedder, EMBEDDER)
        self.reranker = self._role(Reranker, RERANKER)
        self.remembered = Remembered(LocalEmbedder(self.embedder))
        self._stages: dict[str, Stages] = {}

    def versions(self) -> dict[str, str]:
        roles = (self.reasoner, self.embedder, self.reranker)
        return {role.name: role.version for role in roles}

    def stages(self, name: str) -> Stages:
        """With one of `plan.REASONERS`, whose candidates' ECRs are kept on disk."""
        if name not in self._stages:
            inner = self._reasoner(name)
            if name != plan.ORACLE:
                version = f"{self.reasoner.version} {name}"
                inner = Cached(inner, self.work / "ecrs" / f"{name}.jsonl", models=version)
            self._stages[name] = Stages(inner, self.remembered, LocalReranker(self.reranker))
        return self._stages[name]

    def _reasoner(self, name: str) -> ReasonerStage:
        local = LocalReasoner(self.reasoner)
        if name == plan.SHIPPED:
            return local
        if name == "int8":
            return LocalReasoner(self._role(Reasoner, REASONER, quantise="int8"))
        if name == "sampled":
            return Sampled(local, Sampling(temperature=1.0, seed=1))
        if name.startswith("coarse"):
            return Coarse(local, int(name.removeprefix("coarse")))
        oracle = Oracle()
        for case in self.cases.values():
            for query in case.task.queries:
                oracle.learn(Side.QUERY, query.load(), case.ecrs[query.id])
            for item in case.task.candidates():
                oracle.learn(Side.DOCUMENT, item.load(), case.ecrs[item.name])
        return oracle

    def _role(self, kind: Any, name: str, **options: Any) -> Any:
        role = self.open.enter_context(kind.from_pretrained(self.folder / name, **options))
        role.warmup()
        return role


@contextlib.contextmanager
def models(folder: Path, work: Path, cases: dict[str, tasks.Case]) -> Iterator[Models]:
    made = Models(folder, work, cases)
    with made.open:
        yield made


def settings(config: Config, versions: dict[str, str], data: emoji.EmojiData) -> dict[str, Any]:
    """What the pieces depend on."""
    return {
        "models": versions,
        "data": data.manifest["fingerprint"],
        "limit": config.limit,
        "pool": config.pool,
        "seed": config.seed,
    }


def claim(work: Path, wanted: dict[str, Any]) -> None:
    """Makes `work` the folder of these settings.

    Raises InvalidInputError when it holds pieces of others.
    """
    path = work / "settings.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else wanted
    if changed := sorted(key for key in wanted if before.get(key) != wanted[key]):
        raise InvalidInputError(
            f"{work} holds pieces made with other settings ({', '.join(changed)}); delete it, or "
            "give another --work.",
            field="--work",
            reason="OTHER_SETTINGS",
        )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")


def result(kept: pieces.Kept, names: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """The file under `benchmarks/results/`."""
    found = [e for e in plan.EXPERIMENTS if summary.complete(kept, e, names)]
    experiments = {name: summary.experiment(kept, name, names) for name in found}
    if "ablation" in experiments:
        arms = {
            "ECR": plan.ECR.name,
            "ECR + ECRR": f"{plan.ECR.name}-ecrr{plan.DEPTH}",
            "ECR + ECRR + QAR": plan.QAR.name,
        }
        experiments["ablation"]["split"] = summary.split(kept, names, arms)
    return about | {
        "titles": {name: tasks.TITLES[name] for name in names},
        "rewrite_depth": plan.DEPTH,
        "experiments": experiments,
    }


async def run(config: Config) -> Path:
    data = emoji.load(config.data)
    load = environment.foreign_load()
    about = environment.describe("benchmarks.experiments")
    names = list(tasks.NAMES)
    cases = tasks.cases(data, names, queries=config.limit, pool=config.pool, seed=config.seed)
    enable_compile_cache(config.work / "compile-cache")
    kept = pieces.Kept(config.work / "pieces")
    with models(config.models, config.work, cases) as made:
        given = settings(config, made.versions(), data)
        claim(config.work, given)
        about |= {"noisy": environment.noisy(load), "settings": given}
        # Experiment by experiment, so that one is whole before the next begins.
        for experiment in config.only or tuple(plan.EXPERIMENTS):
            began = time.monotonic()
            for reasoner, arms in plan.wanted([experiment]).items():
                for name in names:
                    if left := kept.lacks(reasoner, name, arms):
                        await pieces.run(kept, reasoner, cases[name], left, made.stages(reasoner))
            print(f"{experiment}: done after {time.monotonic() - began:.0f} s", flush=True)
            config.out.parent.mkdir(parents=True, exist_ok=True)
            found = result(kept, names, about)
            config.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return config.out


def main(config: Config) -> int:
    try:
        out = asyncio.run(run(config))
    except FileNotFoundError as error:  # no data set; the message names the command that makes it
        print(error, file=sys.stderr)
        return 3
    except TteError as error:
        print(error.message, file=sys.stderr)
        return 2
    print(f"Wrote {out}.")
    return tables.main([]) if out.resolve() == (environment.ROOT / RESULT).resolve() else 0


if __name__ == "__main__":
    try:
        chosen = tyro.cli(Config)
    except InvalidInputError as error:
        print(error.message, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(chosen))
