"""What the clients of single services share: the channel, health, and malformed answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tte_jax.client.channel import Endpoint
from tte_jax.errors import InternalError, InvalidInputError


class Remote:
    """A service with its channel. Make it inside the event loop that uses it."""

    service = ""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self.endpoint = Endpoint.of(endpoint)
        self.channel: grpc.aio.Channel = self.endpoint.open_async()
        self.metadata = self.endpoint.metadata
        name = self.service.rpartition(".")[2].removesuffix("Service").lower()
        self.peer = f"the {name} at {self.endpoint.address}"
        # The health package's type stubs know neither its methods nor the asyncio channel.
        self._health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def serving(self, *, timeout_s: float = 1.0) -> bool:
        """Whether the service says SERVING; an error or no answer counts as no."""
        request = health_pb2.HealthCheckRequest(service=self.service)
        try:
            answer = await self._health.Check(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def disconnected(self) -> None:
        """Returns when the connection, once there is one, has broken or was closed by the peer."""
        while (state := self.channel.get_state()) is not grpc.ChannelConnectivity.READY:
            await self.channel.wait_for_state_change(state)
        await self.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    async def close(self) -> None:
        await self.channel.close()


@contextmanager
def answers(peer: str) -> Iterator[None]:
    """A malformed answer is the peer's defect, not the caller's input."""
    try:
        yield
    except InvalidInputError as error:
        raise InternalError(f"{peer} gave a malformed answer: {error.message}") from error
