"""rHNM: the retriever learns from what its own reranker finds.

    python -m training.loop --data jsonl:birds.jsonl --state runs/birds --rounds 2

A round: embed the training set with the newest retriever → the nearest documents within each data
set → the reranker service scores and filters them → a sealed round of negatives → the trainer makes
the next retriever. All of it lies in the folder `--state`, and what is complete there is not done
again: loop, reranker and trainer may be killed at any moment, and the same command makes the same
rounds, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from training.configuration import ended
from training.data.rows import ExampleSource
from training.data.sources import open_source, with_option
from training.mining import candidates, miner
from training.mining.embeddings import embed
from training.mining.figures import figures
from training.mining.records import NONE, RANDOM, Rules
from training.mining.rounds import PART_RECORDS, Round, RoundWriter, sealed
from training.mining.table import Table
from training.mining.workspace import Workspace
from training.telemetry import Telemetry
from tte_jax.builtin import models
from tte_jax.client import NegativeMiner, RemoteEmbedder
from tte_jax.errors import PreconditionError
from tte_jax.stages import EmbedderStage

log = logging.getLogger(__name__)

TRAINER = (
    "{python} -m training.contrastive --config builtin --data {data} --model {model} --out {out} "
    "--counts.negatives {count}"
)
IN_PROCESS = "in-process"


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: the training set, KIND:PATH?OPTION=VALUE (docs/training.md). Queries and documents
        that are not text need ECRs, since the reranker reads texts.
      state: folder of the loop.
      rounds: how many times to mine and train.
      model: the first retriever, a model directory or a built-in name.
      embedder: "in-process", or the address of an EmbedderService. A service must be given the
        new retriever after each round; the loop stops and says so.
      reranker: address of a RerankerService; "" = one is started with `reranker_model`.
      reranker_model: a model directory or a built-in name.
      rules: which negatives, see `mining.records.Rules`.
      trainer: command that trains a retriever. {data}, {model}, {out}, {round}, {negatives},
        {count} and {python} are replaced: the data with the round's negatives, the retriever to
        start from, the folder to write, the round's number, its sealed folder, and how many
        negatives a query has at most. It is run again after a
        kill, and goes on from what it left in {out}; when it ends with 0, the retriever is there.
      export: where below {out} the trainer leaves the model directory; "" = {out} itself.
      start: what a round's training begins with: "previous", the retriever that mined the round,
        or "first", the one that the loop began with, so that rounds differ in their negatives and
        not in how long was trained.
      window: queries that the reranker is sent ahead.
      patience_s: how long a service that is away is waited for.
      part_records: records of a part of a round.
      embed_batch: items of one request to the embedder.
      embed_chunk: items of one file of vectors.
    """

    data: str
    state: Path
    rounds: int = 2
    model: str = models.EMBEDDER
    embedder: str = IN_PROCESS
    reranker: str = ""
    reranker_model: str = models.RERANKER
    rules: Rules = field(default_factory=Rules)
    trainer: str = TRAINER
    export: str = "export"
    start: Literal["previous", "first"] = "previous"
    window: int = 8
    patience_s: float = 300.0
    part_records: int = PART_RECORDS
    embed_batch: int = 64
    embed_chunk: int = 1024


@dataclass(frozen=True)
class Training:
    """What a trainer is asked for.

    Attributes:
      round: the number of the round to train on.
      negatives: its sealed folder.
      model: the retriever to start from, see `Config.start`.
      out: the folder to write.
      lock: file descriptor that a process of the trainer inherits, see `Workspace.trainer_lock`.
    """

    round: int
    negatives: Path
    model: Path
    out: Path
    lock: int


Train = Callable[[Training], None]
OpenEmbedder = Callable[[Path], AbstractAsyncContextManager[EmbedderStage]]


async def run(
    config: Config,
    *,
    source: ExampleSource | None = None,
    train: Train | None = None,
    open_embedder: OpenEmbedder | None = None,
) -> Path:
    """Does what is left to do; returns the last retriever's folder.

    Args:
      source: in place of `config.data`.
      train: in place of `config.trainer`.
      open_embedder: in place of `config.embedder`; given the retriever's model directory.

    Raises:
      PreconditionError: the folder is of other settings or data, another loop runs in it, a model
        changed half way, or the trainer failed.
      As the source and the services.
    """
    space = Workspace(config.state, config.export)
    with space.locked():
        space.claim(
            {
                "data": config.data,
                "rules": asdict(config.rules),
                "model": config.model,
                "start": config.start,
                "export": config.export,
                "part_records": config.part_records,
                "embed_batch": config.embed_batch,
                "embed_chunk": config.embed_chunk,
            }
        )
        source = open_source(config.data) if source is None else source
        table = space.table(source, reranks=config.rules.reranks)
        log.info(
            "%d queries, %d documents, %d data sets",
            len(table.queries), len(table.documents), len(table.datasets),
        )  # fmt: skip
        train = train or command_trainer(config)
        opened = open_embedder or embedder_opener(config)
        # Rounds tell everything again, so what a kill left out is there after all.
        telemetry = Telemetry(space.root, steps=config.rounds, shows=False)
        for round in range(config.rounds):
            if round not in sealed(space.rounds):
                await mine_round(config, space, source, table, round, opened)
            telemetry.report(round + 1, _figures(space, table, round))
            if not space.trained(round):
                begin = retriever(config, space, round if config.start == "previous" else 0)
                with space.trainer_lock() as lock:
                    log.info("round %d: training", round)
                    train(Training(round, space.round(round), begin, space.model(round), lock))
                space.mark_trained(round)
        telemetry.close()
        return space.retriever(config.rounds - 1)


def _figures(space: Workspace, table: Table, round: int) -> dict[str, float]:
    path = space.candidates(round)
    found = candidates.load(path)[0] if path.exists() else None
    made = figures(Round(space.round(round), verify=False), table, found)
    return {f"mined/{name}": value for name, value in made.items()}


def retriever(config: Config, space: Workspace, round: int) -> Path:
    """The model directory that mines a round: the first one, later what was trained before."""
    return space.retriever(round - 1) if round else Path(config.model)


async def mine_round(
    config: Config,
    space: Workspace,
    source: ExampleSource,
    table: Table,
    round: int,
    open_embedder: OpenEmbedder,
) -> None:
    """Embeds, searches, scores and seals one round, from wherever that was left."""
    rules, version = config.rules, ""
    found = cosines = np.zeros((0, 0))
    if rules.arm not in (NONE, RANDOM):
        found, cosines, version = await _candidates(
            config, space, source, table, round, open_embedder
        )
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 500 == 0 or done == total:
            log.info("round %d: %d of %d queries mined", round, done, total)

    async with _reranker(config) as negatives:
        reranker = await negatives.version() if negatives is not None else ""
        header = miner.header(table, rules, embedder=version, reranker=reranker)
        writer = RoundWriter(space.rounds, round, header, part_records=config.part_records)
        with writer:
            await miner.mine(
                table, found, cosines, rules, writer,
                round=round, miner=negatives, version=reranker, progress=progress,
            )  # fmt: skip
            counts = Round(writer.seal()).manifest["counts"]
    log.info("round %d: sealed in %.0f s: %s", round, time.monotonic() - started, counts)


async def _candidates(
    config: Config,
    space: Workspace,
    source: ExampleSource,
    table: Table,
    round: int,
    open_embedder: OpenEmbedder,
) -> tuple[np.ndarray, np.ndarray, str]:
    """(documents, cosines, the embedder's version), from their file once it is there."""

    def progress(done: int, total: int) -> None:
        if done % (16 * config.embed_batch) == 0 or done == total:
            log.info("round %d: %d of %d embedded", round, done, total)

    async with open_embedder(retriever(config, space, round)) as stage:
        queries, documents, version = await embed(
            table, source, stage, space.vectors(round),
            batch=config.embed_batch, chunk=config.embed_chunk,
            patience_s=config.patience_s, progress=progress,
        )  # fmt: skip
    if round and version == (space.vectors(round - 1) / "version.txt").read_text():
        raise PreconditionError(
            f"round {round} was embedded by {version}, which mined the round before. Load "
            f"{retriever(config, space, round)} into the embedder at {config.embedder}, delete "
            f"{space.vectors(round)}, and start again.",
            reason="RETRIEVER_NOT_REFRESHED",
        )
    path = space.candidates(round)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        depth = config.rules.depth
        candidates.save(path, *candidates.nearest(table, queries, documents, count=depth))
    return *candidates.load(path), version


@asynccontextmanager
async def _reranker(config: Config) -> AsyncIterator[NegativeMiner | None]:
    if not config.rules.reranks:
        yield None
        return
    async with contextlib.AsyncExitStack() as stack:
        address = config.reranker or await stack.enter_async_context(
            service("reranker", config.reranker_model, config.state)
        )
        negatives = NegativeMiner(address, window=config.window, patience_s=config.patience_s)
        stack.push_async_callback(negatives.close)
        yield negatives


@asynccontextmanager
async def service(role: str, model: str, state: Path) -> AsyncIterator[str]:
    """A model service as a child process; yields its address.

    It is started again when it dies, and ends with this process, however that ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "servers", role, f"--port={port}", f"--{role}-model={model}",
        f"--data-dir={state}", f"--parent-pid={os.getpid()}",
    ]  # fmt: skip

    def start() -> subprocess.Popen[bytes]:
        with (state / f"{role}.log").open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    child = start()

    async def watch() -> None:
        nonlocal child
        while True:
            await asyncio.sleep(1.0)
            if (code := child.poll()) is not None:
                log.warning("the %s ended with code %d; it is started again", role, code)
                child = start()

    watching = asyncio.create_task(watch())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        watching.cancel()
        child.terminate()
        child.wait()


def embedder_opener(config: Config) -> OpenEmbedder:
    """In this process, or the running service that `config.embedder` names."""

    @asynccontextmanager
    async def local(model: Path) -> AsyncIterator[EmbedderStage]:
        from tte_jax.embedder import Embedder
        from tte_jax.engine.executables import enable_compile_cache
        from tte_jax.local import LocalEmbedder

        enable_compile_cache(config.state / "compile-cache")
        with Embedder.from_pretrained(models.resolve(str(model))) as role:
            yield LocalEmbedder(role)

    @asynccontextmanager
    async def remote(model: Path) -> AsyncIterator[EmbedderStage]:
        stage = RemoteEmbedder(config.embedder)
        try:
            yield stage
        finally:
            await stage.close()

    return local if config.embedder == IN_PROCESS else remote


def command_trainer(config: Config) -> Train:
    """Runs `config.trainer` as a process."""

    def train(asked: Training) -> None:
        values = {
            "python": sys.executable,
            "data": with_option(config.data, "mined", str(asked.negatives.absolute())),
            "round": asked.round,
            "negatives": asked.negatives,
            "count": 0 if config.rules.arm == NONE else config.rules.negatives,
            "model": models.resolve(str(asked.model)),
            "out": asked.out,
        }
        # Split first: a path with a space in it stays one word.
        command = [word.format(**values) for word in shlex.split(config.trainer)]
        log.info("%s", shlex.join(command))
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        code = _waited_for(subprocess.Popen(command, pass_fds=(asked.lock,)))
        if code:
            raise PreconditionError(
                f"the trainer of round {asked.round} ended with code {code}; its own output says "
                "why. Start the loop again when that is mended: it goes on here.",
                reason="TRAINER_FAILED",
            )

    return train


def _waited_for(trainer: subprocess.Popen[bytes]) -> int:
    """Its exit code. When this process is made to end, the trainer is asked to, and saves first."""
    try:
        return trainer.wait()
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):  # Ctrl-C reaches it without us
            trainer.terminate()
        trainer.wait()
        raise


def main(config: Config) -> int:
    """Runs the loop; returns the exit code of `tte_jax.cli.exits`."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    return ended(lambda: print(asyncio.run(run(config))))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
