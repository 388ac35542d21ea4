"""ECRs for a training set, written by a running ReasonerService with any checkpoint as teacher.

    python -m training.reason --data jsonl:birds.jsonl --out ecrs/birds --reasoner 127.0.0.1:50061
    python -m training.reason --data jsonl:birds.jsonl --out ecrs/birds --arm ground-truth

Each arm has a file of its own, `OUT/no-ground-truth.jsonl` and `OUT/ground-truth.jsonl`, and every
line names its arm, its model and its budget. Lines are keyed by content: what is there is not asked
again, so the same command goes on after a kill, and a document of many examples is reasoned about
once. `?ecrs=FILE` behind a source's name reads them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from training.configuration import ended
from training.data.ecrs import PLAIN, TRUTH, Ecr, EcrStore, ecr_key
from training.data.examples import Document, Example
from training.data.rows import ExampleSource
from training.data.sources import open_source
from tte_jax.client import RemoteReasoner
from tte_jax.content import Side
from tte_jax.errors import (
    InvalidInputError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from tte_jax.limits import MAX_BATCH_ITEMS, MAX_INSTRUCTION_CHARS
from tte_jax.preprocess.ecr import parse_ecr
from tte_jax.stages import ReasonItem

log = logging.getLogger(__name__)
T = TypeVar("T")

# Fewer than these may agree by chance with what is said without the ground truth.
_ENOUGH_TO_TELL = 4


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: the training set, KIND:PATH?OPTION=VALUE (docs/training.md).
      out: folder of the arms' files.
      arm: whether the prompt shows what is right, the target's text to the query and the query's
        text to the target. A test's prompts never do, so an embedder trained on such ECRs sees
        better ones than it will be served; keep both arms and compare.
      reasoner: address of the ReasonerService.
      sides: reason about queries, documents or both.
      text_documents: also about documents that are only text, such as labels.
      budget: new tokens of each, at most.
      batch: inputs of one request, at most 64.
      patience_s: how long a service that is away or full is waited for.
    """

    data: str
    out: Path
    arm: Literal["no-ground-truth", "ground-truth"] = PLAIN
    reasoner: str = "127.0.0.1:50061"
    sides: Literal["both", "query", "document"] = "both"
    text_documents: bool = False
    budget: int = 512
    batch: int = MAX_BATCH_ITEMS
    patience_s: float = 300.0


@dataclass(frozen=True)
class Asked:
    """One thing to reason about."""

    key: str
    document: Document
    side: Side
    truth: str


@dataclass
class Summary:
    """What a run did: written now, there before, refused by the model, empty."""

    path: Path
    written: int = 0
    known: int = 0
    refused: int = 0
    empty: int = 0


async def run(config: Config, *, source: ExampleSource | None = None) -> Summary:
    """Writes what is missing.

    Raises:
      InvalidInputError: the file is of another model or budget; an example has no ground truth
        in words.
      PreconditionError: the reasoner's prompts carry no instruction, so that it cannot be shown
        the ground truth; or the model changed half way.
      UnavailableError, OverloadedError: the service stayed away.
    """
    if not 1 <= config.batch <= MAX_BATCH_ITEMS:
        raise InvalidInputError(f"batch is {config.batch}: expected 1 to {MAX_BATCH_ITEMS}")
    source = open_source(config.data) if source is None else source
    reasoner = RemoteReasoner(config.reasoner)
    try:
        version = await _patiently(
            lambda: reasoner.version(timeout_s=config.patience_s), config.patience_s
        )
        summary = Summary(config.out / f"{config.arm}.jsonl")
        store = EcrStore(summary.path, arm=config.arm, model=version, budget=config.budget)
        summary.known = len(store)
        teller = _Teller(config, reasoner, version)
        batch: list[Asked] = []
        seen: set[str] = set()
        for index in range(len(source)):
            for asked in _asked(source[index], config):
                if asked.key in store or asked.key in seen:
                    continue
                seen.add(asked.key)
                batch.append(asked)
                if len(batch) == config.batch:
                    await teller.tell(batch, store, summary)
                    batch = []
                    log.info("%d of %d examples, %d ECRs", index + 1, len(source), len(store))
        if batch:
            await teller.tell(batch, store, summary)
        return summary
    finally:
        await reasoner.close()


def _asked(example: Example, config: Config) -> Iterator[Asked]:
    if config.sides != "document":
        truth = words_of(example.positives[0]) if config.arm == TRUTH else ""
        yield _ask(example, example.query, Side.QUERY, truth, config)
    if config.sides != "query":
        for number, document in enumerate((*example.positives, *example.negatives)):
            if document.content.media or config.text_documents:
                # A negative answers nothing, so there is no truth to show beside it.
                right = number < len(example.positives) and config.arm == TRUTH
                truth = words_of(example.query) if right else ""
                if right or config.arm == PLAIN:
                    yield _ask(example, document, Side.DOCUMENT, truth, config)


def _ask(example: Example, document: Document, side: Side, truth: str, config: Config) -> Asked:
    if config.arm == TRUTH and not truth:
        raise InvalidInputError(
            f"{example.dataset}/{example.key}: there is no ground truth in words for its "
            f"{side.value}: the other side has neither a text nor an ECR with an answer. Write "
            "the arm no-ground-truth, or give the data ECRs first.",
            reason="NO_GROUND_TRUTH",
        )
    return Asked(ecr_key(document, side, truth), document, side, truth)


def words_of(document: Document) -> str:
    """A document in words: its text, else the answer of its ECR; may be empty."""
    return document.content.text or parse_ecr(document.ecr).answer


def instruction(document: Document, truth: str) -> str:
    """The document's own instruction, with the ground truth behind it where there is one."""
    if not truth:
        return document.instruction
    told = (
        f"The right result is known: {truth[: MAX_INSTRUCTION_CHARS // 2]}. Reason your way to "
        "it from what is shown, and do not say that it was given."
    )
    return f"{document.instruction[: MAX_INSTRUCTION_CHARS // 3]} {told}".strip()


class _Teller:
    """Asks the service for a batch, and again without what it refuses."""

    def __init__(self, config: Config, reasoner: RemoteReasoner, version: str) -> None:
        self._config, self._reasoner, self._version = config, reasoner, version
        self._proven = config.arm == PLAIN

    async def tell(self, batch: list[Asked], store: EcrStore, summary: Summary) -> None:
        left = list(batch)
        texts: list[str] = []
        while left:
            try:
                texts = await self._reason(left, truth=True)
                break
            except InvalidInputError as error:
                found = re.match(r"inputs\[(\d+)\]", error.field)
                if found is None:
                    raise
                refused = left.pop(int(found[1]))
                summary.refused += 1
                log.warning("%s is left out: %s", refused.document.key[:12], error.message)
        if not left:
            return
        if not self._proven and len(left) >= _ENOUGH_TO_TELL:
            if texts == await self._reason(left, truth=False):
                raise PreconditionError(
                    f"{self._version} says the same with and without the ground truth: its "
                    "prompts carry no instruction (the built-in models' do not). Use a model "
                    "directory with the `full` prompts, or the arm no-ground-truth.",
                    reason="GROUND_TRUTH_IGNORED",
                )
            self._proven = True
        config = self._config
        store.append(
            Ecr(a.key, a.side, config.arm, a.document.key, text, self._version, config.budget)
            for a, text in zip(left, texts, strict=True)
        )
        summary.written += len(left)
        summary.empty += sum(not text for text in texts)

    async def _reason(self, batch: list[Asked], *, truth: bool) -> list[str]:
        items = [
            ReasonItem(
                a.document.content,
                a.side,
                instruction(a.document, a.truth if truth else ""),
            )
            for a in batch
        ]
        reasonings, usage = await _patiently(
            lambda: self._reasoner.reason(items, max_tokens=self._config.budget),
            self._config.patience_s,
        )
        if usage.model_version != self._version:
            raise PreconditionError(
                f"the reasoner is {usage.model_version} by now, and the file is of "
                f"{self._version}. Start that model again, or name another folder with --out.",
                reason="REASONER_MISMATCH",
            )
        return [one.text for one in reasonings]


async def _patiently(ask: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """What a service answers, which may be away or full for so long."""
    waited = 0.0
    while True:
        try:
            return await ask()
        except (UnavailableError, OverloadedError) as error:
            if waited >= patience_s:
                raise
            await asyncio.sleep(error.retry_after_s)
            waited += error.retry_after_s


def main(config: Config) -> int:
    """Runs it; returns the exit code of `tte_jax.cli.exits`."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)

    def work() -> None:
        done = asyncio.run(run(config))
        print(
            f"{done.path}: {done.written} written, {done.known} were there, {done.refused} "
            f"refused, {done.empty} empty"
        )

    return ended(work)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
