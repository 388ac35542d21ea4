"""The model stages in one process: the Protocols of `tte_jax.stages` over role objects.

The servers put gRPC in front of these; the evaluation runs the cascade over them directly. Host
work goes to the role's pool, device work to its thread, and a cancelled coroutine cancels both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from tte_jax.content import Content, Reasoning, Usage
from tte_jax.embedder import Embedder
from tte_jax.engine.role import Role
from tte_jax.errors import DeadlineExceededError
from tte_jax.listwise import ListwiseReranker
from tte_jax.reasoner import Delta, Finished, Reasoner, total
from tte_jax.reranker import Reranker
from tte_jax.stages import GREEDY, Embedding, EmbedItem, Order, ReasonItem, Sampling

T = TypeVar("T")


class LocalReasoner:
    """`ReasonerStage` over a `Reasoner`."""

    def __init__(self, reasoner: Reasoner) -> None:
        self.role = reasoner

    async def reason(
        self,
        items: Sequence[ReasonItem],
        *,
        max_tokens: int,
        timeout_s: float | None = None,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Reasoning], Usage]:
        """One ECR per item, in order.

        Raises: as `Reasoner.prepare` and `Reasoner.submit`, and DeadlineExceededError.
        """
        finished = await self._finished(items, max_tokens, timeout_s, sampling=sampling)
        return [f.reasoning for f in finished], total(self.role.stage, self.role.version, finished)

    async def reason_and_embed(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        """One ECR per item and, of a unified model, the embedding with it.

        Raises: as `reason`.
        """
        finished = await self._finished(items, max_tokens, timeout_s, embed=self.role.embeds)
        usage = total(self.role.stage, self.role.version, finished)
        return [f.reasoning for f in finished], [f.embedding for f in finished], usage

    async def _finished(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int,
        timeout_s: float | None,
        *,
        sampling: Sampling = GREEDY,
        embed: bool = False,
    ) -> list[Finished]:
        async with _within(timeout_s) as deadline:
            futures = await self._start(items, max_tokens, sampling, deadline, None, embed=embed)
            return await _gather(futures)

    async def stream(
        self,
        items: Sequence[ReasonItem],
        *,
        max_tokens: int,
        timeout_s: float | None = None,
        sampling: Sampling = GREEDY,
        deltas: bool = True,
        embed: bool = False,
    ) -> AsyncGenerator[Delta | Finished]:
        """Deltas of all items as they come, and each item's `Finished`.

        Closing the iterator (or cancelling its task) frees the slots. `embed`: see
        `Reasoner.prepare`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Delta | Finished | BaseException] = asyncio.Queue()

        def post(event: Delta | Finished | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def done(future: Future[Finished]) -> None:
            if not future.cancelled():
                post(future.exception() or future.result())

        futures: list[Future[Finished]] = []
        try:
            async with _within(timeout_s) as deadline:
                futures = await self._start(
                    items, max_tokens, sampling, deadline, post if deltas else None, embed=embed
                )
                for future in futures:
                    future.add_done_callback(done)
            left = len(futures)
            while left:
                async with _within(None if deadline is None else deadline - time.monotonic()):
                    event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, Finished)
                yield event
        finally:
            for future in futures:
                future.cancel()

    async def _start(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int,
        sampling: Sampling,
        deadline: float | None,
        on_delta: Callable[[Delta], None] | None,
        *,
        embed: bool,
    ) -> list[Future[Finished]]:
        if embed:
            self.role.check_embeds()
        await _warm(self.role)
        jobs = await _on_host(
            self.role,
            [
                partial(
                    self.role.prepare,
                    item,
                    max_tokens,
                    sampling=sampling,
                    embed=embed,
                    field=f"inputs[{i}].content",
                )
                for i, item in enumerate(items)
            ],
            background=all(item.background for item in items),
        )
        return self.role.submit(jobs, deadline=deadline, on_delta=on_delta)


class LocalEmbedder:
    """`EmbedderStage` over an `Embedder`."""

    def __init__(self, embedder: Embedder) -> None:
        self.role = embedder

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        """[B, D] float32, L2-normalised; `dimension` > 0 truncates and normalises again.

        Raises: as `Embedder.prepare` and `Embedder.submit`, and DeadlineExceededError.
        """
        self.role.check_dimension(dimension)
        async with _within(timeout_s) as deadline:
            await _warm(self.role)
            jobs = await _on_host(
                self.role,
                [
                    partial(self.role.prepare, item, field=f"inputs[{i}].content")
                    for i, item in enumerate(items)
                ],
                background=all(item.background for item in items),
            )
            embedded = await _gather(self.role.submit(jobs, deadline=deadline))
        return self.role.collect(embedded, dimension)


class LocalReranker:
    """`RerankerStage` over a `Reranker`."""

    def __init__(self, reranker: Reranker) -> None:
        self.role = reranker

    async def rerank(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
        background: bool = False,
    ) -> tuple[np.ndarray, Usage]:
        """[N] float32 P(yes), in the given order; in the `background`, searches go first.

        Raises: as `Reranker.prepare` and `Reranker.submit`, and DeadlineExceededError.
        """
        async with _within(timeout_s) as deadline:
            await _warm(self.role)
            (jobs,) = await _on_host(
                self.role,
                [partial(self.role.prepare, query, list(candidates), instruction)],
                background=background,
            )
            scored = await _gather(self.role.submit(jobs, deadline=deadline, background=background))
        return self.role.collect(scored)


class LocalListwise:
    """Orders of a `ListwiseReranker`, without blocking the event loop."""

    def __init__(self, listwise: ListwiseReranker) -> None:
        self.role = listwise

    async def order(
        self,
        query: str,
        candidates: Sequence[str],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[Order, Usage]:
        """Raises: as `ListwiseReranker.prepare` and `submit`, and DeadlineExceededError."""
        async with _within(timeout_s) as deadline:
            await _warm(self.role)
            (job,) = await _on_host(
                self.role,
                [partial(self.role.prepare, query, candidates, instruction)],
                background=False,
            )
            (made,) = await _gather([self.role.submit(job, deadline=deadline)])
        return self.role.collect(job, made)


@asynccontextmanager
async def _within(timeout_s: float | None) -> AsyncIterator[float | None]:
    """Gives the `time.monotonic()` deadline, and ends the block with our error when it passes."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            yield deadline
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("the deadline passed before the stage was done") from None


async def _warm(role: Role) -> None:
    if not role.ready:
        await asyncio.to_thread(role.warmup)


async def _on_host(role: Role, calls: Iterable[Callable[[], T]], *, background: bool) -> list[T]:
    """The calls' results from a host pool; after the first error the rest is not begun."""
    loop = asyncio.get_running_loop()
    pool = role.host_pool if background else role.query_pool
    tasks = [loop.run_in_executor(pool, call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


async def _gather(futures: Sequence[Future[T]]) -> list[T]:
    """All results; on an error or a cancellation the rest is cancelled, on the device too."""
    try:
        return list(await asyncio.gather(*(asyncio.wrap_future(f) for f in futures)))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
