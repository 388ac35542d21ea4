"""Documents as they arrive, gathered into batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tte_jax.cascade.messages import IngestInput, IngestOptions, Rejected
from tte_jax.content import Content, Document, Media
from tte_jax.errors import InvalidInputError, TteError
from tte_jax.limits import MAX_MESSAGE_BYTES
from tte_jax.stages import ReasonItem


@dataclass
class Work:
    """A document on its way through an ingest.

    Attributes:
      position: its place in the input stream.
      error: why it cannot be ingested, seen before any model ran.
      vector: [D] float32, once embedded.
    """

    position: int
    document: Document
    error: TteError | None = None
    vector: np.ndarray | None = None
    reasoner_version: str = ""
    embedder_version: str = ""

    @property
    def id(self) -> str:
        return self.document.id


async def batches(
    documents: AsyncIterator[IngestInput], options: IngestOptions
) -> AsyncGenerator[list[Work], None]:
    """Batches bounded by count and bytes, in order, none with an id twice.

    A batch that is not full is given out when nothing arrived for `options.linger_s`, so that a
    sender who waits for an answer gets it.
    """
    batch: list[Work] = []
    size = position = 0
    pending: asyncio.Future[IngestInput] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(documents))
            await asyncio.wait({pending}, timeout=options.linger_s if batch else None)
            if not pending.done():
                yield batch
                batch, size = [], 0
                continue
            arrived, pending = pending, None
            try:
                work = _work(position, arrived.result())
            except StopAsyncIteration:
                break
            position += 1
            weight = _weight(work.document.content)
            repeated = any(other.id == work.id for other in batch)
            if batch and (repeated or size + weight > options.batch_bytes):
                yield batch
                batch, size = [], 0
            batch.append(work)
            size += weight
            if len(batch) >= options.batch_documents or size >= options.batch_bytes:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def _work(position: int, document: IngestInput) -> Work:
    if isinstance(document, Rejected):
        return Work(position, Document(document.id, Content(())), document.error)
    error = None
    if not document.id:
        error = InvalidInputError(
            "the document has no id; give 1 to 256 characters", field="document.id"
        )
    elif document.content.empty:
        error = InvalidInputError(
            "the document is empty: give a text, an image, a video or a page",
            field="document.content",
            reason="EMPTY_DOCUMENT",
        )
    return Work(position, document, error)


def _weight(content: Content) -> int:
    return sum(len(p.data) if isinstance(p, Media) else len(p.text) for p in content.parts)


ROOM = 2**20
"""Bytes of a message that are left to what is no media."""


def messages(items: Sequence[ReasonItem]) -> Iterator[list[ReasonItem]]:
    """The items in order, cut so that the media of each part fit one message."""
    part: list[ReasonItem] = []
    size = 0
    for item in items:
        media = [*item.content.media, *(item.query.media if item.query else ())]
        own = sum(len(one.data) for one in media)
        if part and size + own > MAX_MESSAGE_BYTES - ROOM:
            yield part
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield part
