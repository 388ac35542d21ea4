"""The stream of `RerankerService.MineNegatives`, held open through broken connections."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

import grpc

from tte.v1 import reranker_pb2, reranker_pb2_grpc
from tte_jax.client.channel import Endpoint
from tte_jax.client.retries import FIRST_PAUSE_S, LONGEST_PAUSE_S
from tte_jax.client.status import translated
from tte_jax.errors import InternalError, InvalidInputError, OverloadedError, UnavailableError

Request = reranker_pb2.MineNegativesRequest
Answer = reranker_pb2.MinedNegatives


@dataclass(frozen=True)
class Refused:
    """A query that the reranker cannot read, such as a text above its limits; and why."""

    query_id: str
    error: InvalidInputError


class NegativeMiner:
    """One reranker service. Make it inside the event loop that uses it.

    Args:
      window: queries that are sent and not yet taken as answers, at most. The server works on one
        query of a stream at a time, so two keep it busy; more hide the network's delay.
      patience_s: how long a service that cannot be reached is waited for, since the last answer.
    """

    def __init__(
        self, endpoint: Endpoint | str, *, window: int = 8, patience_s: float = 120.0
    ) -> None:
        if window < 1:
            raise InvalidInputError(f"window is {window}: expected at least 1", field="window")
        self._endpoint = Endpoint.of(endpoint)
        self._channel: grpc.aio.Channel = self._endpoint.open_async()
        self._stub = reranker_pb2_grpc.RerankerServiceStub(self._channel)
        self._peer = f"the reranker at {self._endpoint.address}"
        self._window, self._patience_s = window, patience_s

    async def close(self) -> None:
        await self._channel.close()

    async def version(self) -> str:
        """Version of the model that scores. Waits for the service as `mine` does."""
        patience = _Patience(self._patience_s)
        while True:
            try:
                with translated(self._peer):
                    about = await self._stub.Info(
                        reranker_pb2.RerankerServiceInfoRequest(),
                        metadata=self._endpoint.metadata,
                        timeout=10.0,
                    )
                return about.model.model_version
            except (UnavailableError, OverloadedError) as error:
                await patience.pause(error)

    async def mine(self, requests: Iterable[Request]) -> AsyncIterator[Answer | Refused]:
        """One answer for each request, in order, each exactly once.

        The next request is drawn only while fewer than `window` are unanswered, and an answer
        counts only when the caller comes for the next: a slow caller holds back the device, and a
        slow device the caller. When the stream breaks, those that were not answered are sent
        again on a new one.

        Args:
          requests: every one with its rules, since a new stream knows none.

        Raises:
          UnavailableError, OverloadedError: the service stayed away for `patience_s`.
          InternalError: it answered another query than the one asked.
        """
        source = iter(requests)
        # Drawn and not yet answered; a new stream begins with these.
        pending: deque[Request] = deque()
        patience = _Patience(self._patience_s)
        while True:
            feed = _Feed(source, pending, self._window)
            call = self._stub.MineNegatives(
                feed.__aiter__(), metadata=self._endpoint.metadata, wait_for_ready=False
            )
            try:
                with translated(self._peer):
                    async for answer in call:
                        self._check(answer, pending)
                        pending.popleft()
                        patience.renew()
                        yield answer
                        feed.took_one()
                if feed.failure is not None:
                    raise feed.failure
                if not pending:
                    return
                raise UnavailableError(f"{self._peer} ended the stream early", reason="CANCELLED")
            except InvalidInputError as error:
                if feed.failure is not None or not pending:
                    raise
                # Queries are worked on in order, so it is the first that has no answer.
                refused = pending.popleft()
                patience.renew()
                yield Refused(refused.query_id, error)
            except (UnavailableError, OverloadedError) as error:
                if feed.failure is not None:
                    raise feed.failure from None
                await patience.pause(error)
            finally:
                feed.stop()
                call.cancel()  # no effect on a call that has ended

    def _check(self, answer: Answer, pending: deque[Request]) -> None:
        if not pending or answer.query_id != pending[0].query_id:
            expected = pending[0].query_id if pending else "none"
            raise InternalError(
                f"{self._peer} answered query {answer.query_id!r}, expected {expected!r}"
            )


class _Feed:
    """The requests of one stream: what an earlier one left unanswered, then new ones."""

    def __init__(self, source: Iterator[Request], pending: deque[Request], window: int) -> None:
        self._source, self._pending, self._window = source, pending, window
        self._room = asyncio.Event()
        self._stopped = False
        self._open = len(pending)  # sent on this stream, or about to be, and not taken
        self.failure: BaseException | None = None

    def took_one(self) -> None:
        self._open -= 1
        self._room.set()

    def stop(self) -> None:
        self._stopped = True
        self._room.set()

    async def __aiter__(self) -> AsyncIterator[Request]:
        for request in list(self._pending):
            yield request
        while not self._stopped:
            if self._open >= self._window:
                self._room.clear()
                await self._room.wait()
                continue
            try:
                request = next(self._source, None)
            except Exception as error:  # gRPC would only log it; `mine` raises it
                self.failure = error
                return
            if request is None:
                return
            self._pending.append(request)
            self._open += 1
            yield request


class _Patience:
    """Pauses that grow while a service stays away, until it has been away for too long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()
        self._pause = FIRST_PAUSE_S

    async def pause(self, error: UnavailableError | OverloadedError) -> None:
        """Raises `error` when the time is up."""
        if time.monotonic() - self._since > self._limit_s:
            raise error
        asked = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        await asyncio.sleep(max(self._pause, asked))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
