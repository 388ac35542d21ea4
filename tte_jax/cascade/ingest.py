"""Ingest: reason → embed → write, the three overlapping, each document settled on its own.

What a unified model has embedded while it reasoned passes the embedding step by.

```
documents ─► read, batch, skip what is stored ─► reason ─► embed ─► write ─► results
                         └── queues of one batch between the steps ──┘
```
A full queue holds back the step before it and in the end the sender, so memory is bounded by a few
batches whatever the corpus' size.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tte_jax.cascade.batches import Work, batches
from tte_jax.cascade.calls import bounded, now, relocated
from tte_jax.cascade.messages import (
    IngestInput,
    IngestOptions,
    IngestUpdate,
    ItemResult,
    ItemState,
)
from tte_jax.content import NO_REASONING, Content, Reasoning, Side, Usage
from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    PreconditionError,
    TteError,
    UnavailableError,
    UnsupportedError,
)
from tte_jax.stages import (
    EmbedItem,
    IndexEntry,
    ReasonItem,
    RememberingIndexStage,
    ResumableIndexStage,
    StoredVersions,
)

if TYPE_CHECKING:
    from tte_jax.cascade.cascade import Cascade

T = TypeVar("T")
log = logging.getLogger(__name__)

# One call may be a whole batch on a slow machine; beyond this the stage hangs.
CALL_S = 300.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
# Errors that may be one document's fault: its batch is halved until the document stands alone.
_ITEM_ERRORS = (InvalidInputError, UnsupportedError, InternalError)
# Where what a stage is given stands in an ingest request.
_PLACES = {
    "content": "document.content",
    "metadata": "document.metadata",
    "id": "document.id",
    "instruction": "options.instruction",
}
# Errors that pass.
_PASSING_ERRORS = (UnavailableError, OverloadedError, DeadlineExceededError)


class Ingest:
    """The state of one ingest stream."""

    def __init__(
        self, cascade: Cascade, documents: AsyncIterator[IngestInput], options: IngestOptions
    ) -> None:
        if options.reasoning_tokens < 0 or options.batch_documents < 1:
            raise InvalidInputError(
                f"reasoning_tokens is {options.reasoning_tokens} and batch_documents "
                f"{options.batch_documents}; expected at least 0 and 1",
                field="options",
            )
        self.cascade = cascade
        self.documents = documents
        self.options = options
        self.received = 0
        self.totals: Counter[ItemState] = Counter()
        self.sequence = 0
        self.usage: dict[tuple[str, str], Usage] = {}
        self.error: Exception | None = None
        # Ids between reading and writing: what the index says of them is about to change.
        self.in_flight: Counter[str] = Counter()
        self.versions: tuple[str, str] | None = None
        self.settled: asyncio.Queue[list[ItemResult] | None] = asyncio.Queue(maxsize=4)

    async def run(self) -> AsyncGenerator[IngestUpdate, None]:
        read: asyncio.Queue[list[Work] | None] = asyncio.Queue(maxsize=1)
        reasoned: asyncio.Queue[list[Work] | None] = asyncio.Queue(maxsize=1)
        embedded: asyncio.Queue[list[Work] | None] = asyncio.Queue(maxsize=1)
        steps = [
            asyncio.create_task(self._read(read)),
            asyncio.create_task(self._step(read, self._reason, reasoned)),
            asyncio.create_task(self._step(reasoned, self._embed, embedded)),
            asyncio.create_task(self._step(embedded, self._write, self.settled)),
        ]
        try:
            while (results := await self.settled.get()) is not None:
                self.totals.update(result.state for result in results)
                yield self._update(results)
            if self.error is not None:
                raise self.error
            yield self._update([], final=True)
        finally:
            for step in steps:
                step.cancel()
            await asyncio.gather(*steps, return_exceptions=True)

    def _update(self, results: Sequence[ItemResult], *, final: bool = False) -> IngestUpdate:
        return IngestUpdate(
            results=tuple(results),
            received=self.received,
            stored=self.totals[ItemState.STORED],
            skipped=self.totals[ItemState.SKIPPED],
            failed=self.totals[ItemState.FAILED],
            sequence=self.sequence,
            usage=tuple(self.usage.values()),
            final=final,
        )

    # --- the steps ---

    async def _step(
        self,
        source: asyncio.Queue[list[Work] | None],
        work: Callable[[list[Work]], Awaitable[list[T]]],
        target: asyncio.Queue[list[T] | None],
    ) -> None:
        """Runs batches through `work`. After an error it ends; what is behind it still finishes."""
        try:
            while (batch := await source.get()) is not None:
                if done := await work(batch):
                    await target.put(done)
        except Exception as error:
            self.error = self.error or error
        await target.put(None)

    async def _read(self, target: asyncio.Queue[list[Work] | None]) -> None:
        try:
            async with aclosing(batches(self.documents, self.options)) as arriving:
                async for batch in arriving:
                    self.received += len(batch)
                    good = [work for work in batch if work.error is None]
                    if len(good) < len(batch):
                        await self.settled.put([_failed(w, w.error) for w in batch if w.error])
                    if fresh := await self._unstored(good):
                        self.in_flight.update(work.id for work in fresh)
                        await target.put(fresh)
        except Exception as error:
            self.error = self.error or error
        await target.put(None)

    async def _unstored(self, batch: list[Work]) -> list[Work]:
        """The batch without the documents that are stored unchanged; those are settled."""
        index = self.cascade.index
        if not self.options.skip_stored or not isinstance(index, ResumableIndexStage):
            return batch
        ids = [work.id for work in batch if not self.in_flight[work.id]]
        if not ids:
            return batch

        async def existing() -> tuple[dict[str, StoredVersions], Usage]:
            found = await index.existing(ids, timeout_s=CALL_S)
            return {id: StoredVersions(*row) for id, row in found.items()}, Usage("index")

        stored, _ = await self._patient("index", existing)
        if not stored:
            return batch
        reasoner, embedder = await self._current_versions()

        def unchanged(work: Work) -> bool:
            document, found = work.document, stored.get(work.id)
            made = StoredVersions(
                document.content.content_hash, reasoner, embedder, document.metadata
            )
            # A flag equals a number in Python, and in no filter.
            return found is not None and found == made and _flags(found) == _flags(made)

        same = [work for work in batch if unchanged(work)]
        if not same:
            return batch
        await self.settled.put([ItemResult(w.position, w.id, ItemState.SKIPPED) for w in same])
        skipped = {work.position for work in same}
        return [work for work in batch if work.position not in skipped]

    async def _current_versions(self) -> tuple[str, str]:
        """(reasoner stamp, embedder version) of now. Every answer carries its model's version, so
        the smallest request tells; asked once per stream, and only when something depends on it."""
        if self.versions is None:
            probe, tokens = Content.of("version"), self.options.reasoning_tokens
            reasoner = ""
            if tokens:
                item = ReasonItem(content=probe, side=Side.DOCUMENT)
                _, usage = await self._patient(
                    "reason",
                    lambda: self.cascade.reasoner.reason([item], max_tokens=1, timeout_s=CALL_S),
                )
                reasoner = self.cascade.reasoner_version = usage.model_version
            _, usage = await self._patient(
                "embed",
                lambda: self.cascade.embedder.embed(
                    [EmbedItem(content=probe, side=Side.DOCUMENT)], timeout_s=CALL_S
                ),
            )
            self.cascade.embedder_version = usage.model_version
            self.versions = (self._stamp(reasoner), usage.model_version)
        return self.versions

    async def _reason(self, batch: list[Work]) -> list[Work]:
        tokens = self.options.reasoning_tokens
        if not tokens:
            for work in batch:
                work.document = replace(work.document, reasoning=NO_REASONING)
                work.reasoner_version = self._stamp("")
            return batch

        async def call(works: Sequence[Work]) -> list[Work]:
            items = [
                ReasonItem(
                    content=work.document.content,
                    side=Side.DOCUMENT,
                    instruction=self.options.instruction,
                )
                for work in works
            ]

            (reasonings, embeddings), usage = await self._patient(
                "reason",
                lambda: self.cascade.reason(items, max_tokens=tokens, timeout_s=CALL_S),
            )
            for work, reasoning, embedding in zip(works, reasonings, embeddings, strict=True):
                work.document = replace(work.document, reasoning=reasoning)
                work.reasoner_version = self._stamp(usage.model_version)
                if embedding is not None:
                    work.vector = embedding.vector
                    work.embedder_version = embedding.usage.model_version
                    self._spent(embedding.usage)
            return list(works)

        if self.cascade.unified:
            await self._current_versions()  # of now: an empty corpus takes whatever comes first
        known = await self._reasoned_before(batch)
        todo = [work for work in batch if work.position not in known]
        done = await self._isolated(todo, call) if todo else []
        return sorted(
            done + [work for work in batch if work.position in known], key=lambda w: w.position
        )

    async def _reasoned_before(self, batch: list[Work]) -> set[int]:
        """Gives the works the ECR that the corpus has of the same content, made by the same model
        in the same way; returns their positions. A copy costs no reasoning, whatever its id."""
        index = self.cascade.index
        if not self.options.skip_stored or not isinstance(index, RememberingIndexStage):
            return set()
        hashes = list(dict.fromkeys(work.document.content.content_hash for work in batch))

        async def ask() -> tuple[Mapping[tuple[str, str], Reasoning], Usage]:
            return await index.reasonings_of(hashes, timeout_s=CALL_S), Usage("index")

        found, _ = await self._patient("index", ask)
        if not found:
            return set()
        reasoner, _ = await self._current_versions()
        known: set[int] = set()
        for work in batch:
            reasoning = found.get((work.document.content.content_hash, reasoner))
            if reasoning is not None:
                work.document = replace(work.document, reasoning=reasoning)
                work.reasoner_version = reasoner
                known.add(work.position)
        return known

    async def _embed(self, batch: list[Work]) -> list[Work]:
        async def call(works: Sequence[Work]) -> list[Work]:
            items = [
                EmbedItem(
                    content=work.document.content,
                    side=Side.DOCUMENT,
                    reasoning=work.document.reasoning.text,
                    instruction=self.options.instruction,
                )
                for work in works
            ]

            vectors, usage = await self._patient(
                "embed", lambda: self.cascade.embedder.embed(items, timeout_s=CALL_S)
            )
            if vectors.shape[0] != len(works) or not np.isfinite(vectors).all():
                raise InternalError(
                    "the embedder answered with an unusable vector", reason="NOT_FINITE"
                )
            self.cascade.embedder_version = usage.model_version
            for work, vector in zip(works, vectors, strict=True):
                work.vector, work.embedder_version = vector, usage.model_version
            return list(works)

        ready = [work for work in batch if work.vector is not None]
        todo = [work for work in batch if work.vector is None]
        done = await self._isolated(todo, call) if todo else []
        return sorted(ready + done, key=lambda work: work.position)

    async def _write(self, batch: list[Work]) -> list[ItemResult]:
        async def call(works: Sequence[Work]) -> list[Work]:
            entries = [
                IndexEntry(
                    document=work.document,
                    vector=work.vector,
                    reasoner_version=work.reasoner_version,
                    embedder_version=work.embedder_version,
                )
                for work in works
                if work.vector is not None
            ]

            async def upsert() -> tuple[int, Usage]:
                try:
                    written = await self.cascade.index.upsert(entries, timeout_s=CALL_S)
                except PreconditionError as error:
                    # These vectors are lost; sent again, the documents get those of the other one.
                    self.cascade.change_over(error)
                    raise
                return written, Usage("index")

            self.sequence, _ = await self._patient("index", upsert)
            return list(works)

        written = await self._isolated(batch, call)
        self._landed(written)
        return [ItemResult(w.position, w.id, ItemState.STORED) for w in written]

    # --- what the steps share ---

    async def _isolated(
        self, works: Sequence[Work], call: Callable[[Sequence[Work]], Awaitable[list[Work]]]
    ) -> list[Work]:
        """`call` on the batch; when something in it is bad, the bad fail alone."""
        try:
            return await call(works)
        except _ITEM_ERRORS as error:
            if len(works) == 1:
                self._landed(works)
                if isinstance(error, InvalidInputError):
                    error = relocated(error, _PLACES)
                await self.settled.put([_failed(works[0], error)])
                return []
        half = len(works) // 2
        first = await self._isolated(works[:half], call)
        return first + await self._isolated(works[half:], call)

    async def _patient(
        self, stage: str, call: Callable[[], Awaitable[tuple[T, Usage]]]
    ) -> tuple[T, Usage]:
        """One stage call, repeated while the stage is away, for at most `patience_s`."""
        began, pause = now(), FIRST_PAUSE_S
        while True:
            started = now()
            try:
                value, usage = await bounded(stage, call(), CALL_S)
            except _PASSING_ERRORS as error:
                asked = 0.0 if isinstance(error, DeadlineExceededError) else error.retry_after_s
                wait = min(max(pause, asked), LONGEST_PAUSE_S)
                if now() + wait - began > self.options.patience_s:
                    raise
                log.info("ingest waits %.3g s for %s: %s", wait, stage, error.message)
                await asyncio.sleep(wait)
                pause *= 2
                continue
            self._spent(replace(usage, stage=stage, wall_s=now() - started))
            return value, usage

    def _spent(self, usage: Usage) -> None:
        key = (usage.stage, usage.within)
        total = self.usage.get(key, Usage(usage.stage))
        self.usage[key] = Usage(
            stage=usage.stage,
            tokens_in=total.tokens_in + usage.tokens_in,
            tokens_out=total.tokens_out + usage.tokens_out,
            cached_tokens=total.cached_tokens + usage.cached_tokens,
            queue_s=total.queue_s + usage.queue_s,
            compute_s=total.compute_s + usage.compute_s,
            model_version=usage.model_version or total.model_version,
            wall_s=total.wall_s + usage.wall_s,
            within=usage.within,
        )

    def _stamp(self, version: str) -> str:
        """The reasoner's version with what else shapes an ECR, so that a change of budget or
        instruction makes documents again. Empty when there is neither ECR nor instruction."""
        options = self.options
        stamp = f"{version}@{options.reasoning_tokens}" if options.reasoning_tokens else ""
        if options.instruction:
            stamp += "#" + hashlib.sha256(options.instruction.encode()).hexdigest()[:8]
        return stamp

    def _landed(self, works: Sequence[Work]) -> None:
        for work in works:
            self.in_flight[work.id] -= 1
            if not self.in_flight[work.id]:
                del self.in_flight[work.id]


def _failed(work: Work, error: TteError) -> ItemResult:
    return ItemResult(work.position, work.id, ItemState.FAILED, error)


def _flags(versions: StoredVersions) -> set[str]:
    return {key for key, value in (versions.metadata or {}).items() if isinstance(value, bool)}
