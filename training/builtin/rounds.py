"""rHNM rounds of the built-in models: the retriever learns from what its own reranker finds.

    python -m training.builtin.rounds --models tte_jax/builtin/weights --out .data/runs/rounds

A round is one of `training.loop` over other training queries: the reasoner words queries and
drawings → the embedder finds the nearest hundred of each → the reranker service scores and filters
them → a sealed round → the unified trainer goes on for some steps with batches in which queries
meet their negatives, and with all it learnt before, reasoning included. Held-out queries, other
ones than the final figures are of, are then asked to the retriever before and after. A round that
made it worse is dropped, and the next one begins from what was kept; `rounds.jsonl` tells both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from training import loop, reason
from training.builtin import compare
from training.configuration import ended
from training.data.sources import open_source, with_option
from training.mining.records import Rules
from training.mining.rounds import Round
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.corpus.durable import write_atomically
from tte_jax.errors import InvalidInputError, PreconditionError

log = logging.getLogger(__name__)

ARMS = ("none", "ecr")
MEASURE = "mrr@50"


@dataclass(frozen=True)
class Queries:
    """How many training queries of each kind a round mines for."""

    text: int = 450
    image: int = 100
    composed: int = 250


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `training.data.emoji`.
      models: folder with the two model directories to begin with.
      own: what `training.builtin.own` wrote; shown in place of most true ECRs, as before.
      out: folder of the rounds.
      result: folder for the model directories at the end; None = `models` in `out`.
      rounds: how many.
      queries: of each round.
      rules: how negatives are chosen.
      steps, lr, warmup: of the trainer, in each round.
      limit, composed, pool, skip: of the held-out queries, as in `training.builtin.evaluate`;
        `skip` passes over those that the final figures are of.
    """

    data: Path = Path(".data/emoji")
    models: Path = WEIGHTS_DIR
    own: Path | None = None
    out: Path = Path(".data/runs/rounds")
    result: Path | None = None
    rounds: int = 2
    queries: Queries = field(default_factory=Queries)
    rules: Rules = field(default_factory=Rules)
    steps: int = 60
    lr: float = 3e-4
    warmup: int = 10
    limit: int = 100
    composed: int = 100
    pool: int = 500
    skip: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whether a round's retriever takes the place of the one before.

    Attributes:
      kept: it is not worse: the mean difference over tasks and arms is not below zero, and no
        arm's interval over tasks lies below zero as a whole.
      figures: for each arm and for the reasonings, (difference, low, high) over all tasks.
    """

    kept: bool
    figures: dict[str, tuple[float, float, float]]


def verdict(before: Path, after: Path) -> Verdict:
    """Of two evaluations' ranks. Raises as `compare.read` and `compare.paired`."""
    scores = compare.paired(compare.read(before), compare.read(after), MEASURE)
    found = {arm: compare.over_tasks(tasks) for arm, tasks in scores.items()}
    mean = sum(found[arm].mean for arm in ARMS) / len(ARMS)
    kept = mean >= 0 and all(found[arm].high >= 0 for arm in ARMS)
    return Verdict(kept, {a: (d.mean, d.low, d.high) for a, d in found.items()})


def data_of(config: Config, number: int) -> str:
    """The training queries of a round: every round draws others."""
    counts = "&".join(f"{kind}={count}" for kind, count in asdict(config.queries).items())
    return f"emoji:{config.data}?{counts}&seed={config.seed + number + 1}"


def trainer_of(config: Config) -> str:
    """Command of `loop.Config.trainer`."""
    options = [
        "--data", str(config.data), "--steps", str(config.steps), "--lr", str(config.lr),
        "--warmup", str(config.warmup), "--seed", str(config.seed + 1),
    ]  # fmt: skip
    if config.own is not None:
        options += ["--own", str(config.own)]
    words = shlex.join(options).replace("{", "{{").replace("}", "}}")
    return (
        "{python} -m training.builtin.unified --start {model} --mined {negatives} --out {out} "
        + words
    )


async def mined_and_trained(config: Config, number: int, models: Path, folder: Path) -> Path:
    """The retriever that comes out of one round; what is there already is not done again."""
    data = data_of(config, number)
    source = open_source(data)
    ecrs = folder / "ecrs"
    started = time.monotonic()
    async with loop.service("reasoner", str(models / REASONER), folder) as address:
        done = await reason.run(
            reason.Config(data=data, out=ecrs, reasoner=address, budget=64), source=source
        )
    log.info("round %d: %d ECRs in %.0f s", number, done.written, time.monotonic() - started)
    return await loop.run(
        loop.Config(
            data=with_option(data, "ecrs", str(done.path)),
            state=folder / "loop",
            rounds=1,
            model=str(models / REASONER),
            reranker_model=str(models / RERANKER),
            rules=config.rules,
            trainer=trainer_of(config),
        )
    )


def evaluated(config: Config, models: Path, folder: Path) -> Path:
    """The file of ranks of the held-out queries, made when it is missing."""
    ranks = folder / "ranks.json"
    if ranks.exists():
        return ranks
    command = [
        sys.executable, "-m", "training.builtin.evaluate", "--data", str(config.data),
        "--models", str(models), "--out", str(folder / "held_out.json"), "--no-rerank",
        "--limit", str(config.limit), "--composed", str(config.composed),
        "--pool", str(config.pool), "--skip", str(config.skip), "--seed", str(config.seed + 1),
        "--ranks", str(folder / "ranks.partial"),
    ]  # fmt: skip
    if code := subprocess.run(command, check=False).returncode:
        raise PreconditionError(
            f"the evaluation of {models} ended with code {code}; its own output says why",
            reason="EVALUATION_FAILED",
        )
    (folder / "ranks.partial").rename(ranks)
    return ranks


def put(retriever: Path, reranker: Path, models: Path) -> None:
    """Both as one folder of models, which appears when it is whole."""
    work = models.with_name(f".{models.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shutil.copytree(retriever, work / REASONER)
    shutil.copytree(reranker, work / RERANKER)
    shutil.rmtree(models, ignore_errors=True)
    work.rename(models)


async def run(config: Config) -> Path:
    """All rounds; the folder with the models that were kept.

    Raises InvalidInputError for options that fit nothing; else as `training.loop.run`.
    """
    if config.rounds < 1 or not any(asdict(config.queries).values()):
        raise InvalidInputError(
            f"{config.rounds} rounds over {config.queries}: expected at least one round and one"
            " query",
            field="rounds",
        )
    for name in (REASONER, RERANKER):
        if not (config.models / name / "config.json").is_file():
            raise InvalidInputError(
                f"--models {config.models} has no model directory {name}", field="models"
            )
    config.out.mkdir(parents=True, exist_ok=True)
    told = config.out / "rounds.jsonl"
    rows: list[str] = []
    kept, folder = config.models, config.out / "begin"
    folder.mkdir(exist_ok=True)
    before = evaluated(config, kept, folder)
    for number in range(config.rounds):
        folder = config.out / f"round-{number}"
        folder.mkdir(exist_ok=True)
        trained = await mined_and_trained(config, number, kept, folder)
        models = folder / "models"
        if not models.exists():
            put(trained, kept / RERANKER, models)
        after = evaluated(config, models, folder)
        found = verdict(before, after)
        counts = Round(folder / "loop/rounds/round-00000").manifest["counts"]
        row = {"round": number, "from": str(kept), "kept": found.kept, "measure": MEASURE}
        row |= {"difference": found.figures, "mined": counts}
        rows.append(json.dumps(row))
        write_atomically(told, ("\n".join(rows) + "\n").encode())
        log.info("round %d: %s: %s", number, "kept" if found.kept else "dropped", found.figures)
        if found.kept:
            kept, before = models, after
    result = config.result or config.out / "models"
    put(kept / REASONER, kept / RERANKER, result)
    return result


def main(config: Config) -> int:
    """Runs it; returns the exit code of `tte_jax.cli.exits`."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    return ended(lambda: print(asyncio.run(run(config))))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
