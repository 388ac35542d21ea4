"""Which services the commands talk to, and how."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tte_jax.cli import state
from tte_jax.client import (
    Client,
    RemoteEmbedder,
    RemoteIndex,
    RemoteReasoner,
    RemoteReranker,
)
from tte_jax.errors import InvalidInputError

__all__ = ["Client", "addresses", "ask", "checked", "connect"]

T = TypeVar("T")
_STAGES: Mapping[str, type[Any]] = {
    "reasoner": RemoteReasoner,
    "embedder": RemoteEmbedder,
    "reranker": RemoteReranker,
    "index": RemoteIndex,
}


def addresses() -> Mapping[str, str]:
    """Service → host:port: of the system that runs on this machine, else the usual ports."""
    given = os.environ.get("TTE_DATA_DIR")
    folder = state.data_dir(Path(given) if given else None)
    return state.running_addresses(folder) or state.USUAL_ADDRESSES


def connect(address: str = "") -> Client:
    """A client of the gateway at `address`, or of the running system's. It connects with the first
    call. Raises InvalidInputError for what cannot be an address."""
    return Client(checked(address) or addresses()["gateway"])


def ask(role: str, address: str, call: Callable[[Any], Awaitable[T]]) -> T:
    """What `call` gets from the service of `role` ("reasoner", "embedder", "reranker",
    "index")."""
    target = checked(address) or addresses()[role]

    async def run() -> T:
        stage = _STAGES[role](target)
        try:
            return await call(stage)
        finally:
            await stage.close()

    return asyncio.run(run())


def checked(address: str) -> str:
    """`address` unless it is not host:port or a gRPC target; raises InvalidInputError then."""
    if not address or "://" in address or address.startswith("unix:"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInputError(
            f"--address {address!r} is not host:port, such as 127.0.0.1:50060.",
            field="--address",
            reason="INVALID_ADDRESS",
        )
    return address
