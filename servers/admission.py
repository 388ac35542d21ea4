"""Who may come in: a bound on the requests in work, and a door that opens and closes.

grpcio's own `maximum_concurrent_rpcs` also rejects health checks, so that a merely busy server
looks dead; here health and reflection always pass.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from servers.errors import abort
from servers.interception import guarded, is_exempt
from tte_jax.errors import OverloadedError, TteError, UnavailableError


class Door(enum.Enum):
    """What the server does with new requests, and the word for it in errors."""

    WARMING = "WARMING_UP"
    OPEN = "OPEN"
    DRAINING = "DRAINING"


class Admission(grpc.aio.ServerInterceptor):
    """Admits at most `limit` requests at once while the door is open.

    A refused request costs nothing: full means RESOURCE_EXHAUSTED, a closed door UNAVAILABLE, both
    with RetryInfo. Used on one event loop only.
    """

    def __init__(self, limit: int, *, retry_after_s: float = 1.0) -> None:
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.door = Door.WARMING
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refused_at = float("-inf")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or is_exempt(handler_call_details.method):
            return handler
        return guarded(handler, self._admitted)

    async def idle(self) -> None:
        """Returns when no admitted request is left."""
        await self._idle.wait()

    async def quiet(self, for_s: float) -> None:
        """Returns when no request was refused during the last `for_s` seconds."""
        while (left := self._refused_at + for_s - time.monotonic()) > 0:
            await asyncio.sleep(left)

    @asynccontextmanager
    async def _admitted(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if refusal := self._refusal():
            self._refused_at = time.monotonic()
            await abort(context, refusal)
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def _refusal(self) -> TteError | None:
        if self.door is not Door.OPEN:
            state = "warming up" if self.door is Door.WARMING else "shutting down"
            return UnavailableError(
                f"the server is {state}; try again or use another replica",
                retry_after_s=self.retry_after_s,
                reason=self.door.value,
            )
        if self.in_flight >= self.limit:
            return OverloadedError(
                f"{self.in_flight} requests are in work, the server's limit; "
                f"try again in {self.retry_after_s:g} s",
                retry_after_s=self.retry_after_s,
                limit=self.limit,
            )
        return None
