"""`stages.IndexStage` over a `CorpusIndex` in this process: one writer thread, several readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tte_jax.content import Document, Reasoning, Usage
from tte_jax.errors import DeadlineExceededError
from tte_jax.filters import Filter
from tte_jax.index.corpus_index import CorpusIndex
from tte_jax.index.reports import Fetched, IndexStats, RebuildReport, SnapshotReport
from tte_jax.stages import Hit, IndexEntry, Promoted, StagedVector, StoredVersions

T = TypeVar("T")


class LocalIndex:
    """Runs an index off the event loop.

    A call whose deadline passes while it waits for a thread is never run. A write that has begun
    is not undone: it may be stored although its caller got `DeadlineExceededError`; since writes
    are by id, sending it again is safe.
    """

    def __init__(self, index: CorpusIndex, *, readers: int = 4) -> None:
        self.index = index
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="index-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="index-writer")
        # A rebuild of minutes must not take a reader's place.
        self._admin = ThreadPoolExecutor(2, thread_name_prefix="index-admin")

    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        asked = time.perf_counter()

        def work() -> tuple[list[Hit], float, float]:
            begun = time.perf_counter()
            hits = self.index.search(vector, k, filter, embedder_version=embedder_version)
            return hits, begun, time.perf_counter()

        hits, begun, ended = await self._run(self._readers, work, timeout_s)
        return hits, Usage(stage="index", queue_s=begun - asked, compute_s=ended - begun)

    async def search_batch(
        self,
        vectors: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        ids_only: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[list[list[Hit]], Usage]:
        """See `CorpusIndex.search_batch`."""
        asked = time.perf_counter()

        def work() -> tuple[list[list[Hit]], float, float]:
            begun = time.perf_counter()
            hits = self.index.search_batch(
                vectors, k, filter, embedder_version=embedder_version, ids_only=ids_only
            )
            return hits, begun, time.perf_counter()

        hits, begun, ended = await self._run(self._readers, work, timeout_s)
        return hits, Usage(stage="index", queue_s=begun - asked, compute_s=ended - begun)

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        return await self._run(self._writer, lambda: self.index.upsert(entries), timeout_s)

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        return await self._run(self._writer, lambda: self.index.delete(ids), timeout_s)

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        return await self._run(self._readers, lambda: self.index.get(ids), timeout_s)

    async def existing(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> dict[str, StoredVersions]:
        """Content hash and model versions of the ids that exist."""
        return await self._run(self._readers, lambda: self.index.existing(ids), timeout_s)

    async def reasonings_of(
        self, content_hashes: Sequence[str], *, timeout_s: float | None = None
    ) -> dict[tuple[str, str], Reasoning]:
        """See `CorpusStore.reasonings_of`."""
        return await self._run(
            self._readers, lambda: self.index.reasonings_of(content_hashes), timeout_s
        )

    async def fetch(
        self,
        ids: Sequence[str],
        *,
        omit_media: bool = False,
        max_media_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Fetched | None]:
        """See `CorpusIndex.fetch`."""

        def work() -> list[Fetched | None]:
            return self.index.fetch(ids, omit_media=omit_media, max_media_bytes=max_media_bytes)

        return await self._run(self._readers, work, timeout_s)

    async def stats(self, *, timeout_s: float | None = None) -> IndexStats:
        return await self._run(self._readers, self.index.stats, timeout_s)

    async def snapshot(self, *, timeout_s: float | None = None) -> SnapshotReport:
        """See `CorpusIndex.snapshot`; goes on when the caller gives up."""
        return await self._run(self._admin, self.index.snapshot, timeout_s)

    async def rebuild(self, *, timeout_s: float | None = None) -> RebuildReport:
        """See `CorpusIndex.rebuild`; goes on when the caller gives up."""
        return await self._run(self._admin, self.index.rebuild, timeout_s)

    async def pending(
        self,
        embedder_version: str,
        *,
        limit: int,
        after: str = "",
        restart: bool = False,
        max_media_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[list[Document], int, int]:
        """See `CorpusIndex.pending`."""

        def work() -> tuple[list[Document], int, int]:
            documents, state = self.index.pending(
                embedder_version,
                limit=limit,
                after=after,
                restart=restart,
                max_media_bytes=max_media_bytes,
            )
            return documents, state.pending, state.staged

        return await self._run(self._writer, work, timeout_s)

    async def stage(
        self,
        embedder_version: str,
        vectors: Sequence[StagedVector],
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """See `Staging.put`."""
        return await self._run(
            self._writer, lambda: self.index.staging.put(embedder_version, vectors), timeout_s
        )

    async def promote(self, embedder_version: str, *, timeout_s: float | None = None) -> Promoted:
        """See `CorpusIndex.promote`; goes on when the caller gives up."""
        return await self._run(self._admin, lambda: self.index.promote(embedder_version), timeout_s)

    async def verify(self, *, media: bool = True, timeout_s: float | None = None) -> list[str]:
        """See `CorpusIndex.verify`; goes on when the caller gives up."""
        return await self._run(self._admin, lambda: self.index.verify(media=media), timeout_s)

    async def close(self) -> None:
        """Finish what runs, then close the index."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._stop)

    def _stop(self) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._admin.shutdown(wait=True, cancel_futures=True)
        self.index.close()

    async def _run(
        self, pool: ThreadPoolExecutor, work: Callable[[], T], timeout_s: float | None
    ) -> T:
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceededError("the deadline had passed when the index was asked")
        # Cancelling the wrapper cancels the work while it still waits for a thread.
        future = asyncio.wrap_future(pool.submit(work))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as exc:
            raise DeadlineExceededError(
                f"the index did not answer within {timeout_s:.3g} s"
            ) from exc
