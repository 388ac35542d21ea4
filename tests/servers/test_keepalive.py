"""Long calls keep their connection. A server's limit on pings, which gRPC sets to one in five
minutes, would send clients that ping away with GOAWAY `too_many_pings`; a connection that has come
of age takes no new calls and lets the old ones end."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from servers import runtime
from servers.settings import Settings
from tests.servers import echo
from tte.v1 import embedder_pb2_grpc

# A call of two and a half minutes with a ping every 30 s, so many times as fast: clients of gRPC
# ping at most once a second.
FASTER = 25
LIMIT = "grpc.http2.min_ping_interval_without_data_ms"
PING_MS, CALL_S = 30_000 // FASTER, 150 / FASTER
GRPCS_OWN_MS = 300_000


async def through_a_long_call(
    changed: dict[str, int], call_s: float = CALL_S
) -> tuple[grpc.StatusCode, str]:
    """How the call ends, and what is said of it, with a server of which some options differ."""
    servicer, stop = echo.Echo(), asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    options = dict(runtime.SERVER_OPTIONS) | changed
    patch = pytest.MonkeyPatch()
    patch.setattr(runtime, "SERVER_OPTIONS", tuple(options.items()))
    task = asyncio.create_task(
        runtime.serve(
            Settings(service="embedder", port=0, grace_s=1.0),
            servicer.service,
            stop=stop,
            ready=port.set_result,
        )
    )
    options = (
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    )
    try:
        address = f"127.0.0.1:{await port}"
        patch.undo()
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
            try:
                await stub.Embed(echo.request(how=str(round(1000 * call_s))))
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
            return grpc.StatusCode.OK, ""
    finally:
        servicer.hold.set()
        stop.set()
        await task


async def test_pings_through_a_long_call_do_not_end_it() -> None:
    ours = dict(runtime.SERVER_OPTIONS)[LIMIT]
    assert (await through_a_long_call({LIMIT: ours // FASTER}))[0] is grpc.StatusCode.OK


async def test_with_grpcs_own_limit_they_would() -> None:
    # The third ping too many is the end; a client that lacks its processor takes longer to send it.
    end, _ = await through_a_long_call({LIMIT: GRPCS_OWN_MS // FASTER}, call_s=10 * CALL_S)
    assert end is grpc.StatusCode.UNAVAILABLE


async def test_a_call_may_outlive_the_age_of_its_connection() -> None:
    """An ingest of hours, on a connection that takes no new calls after five minutes; a thousand
    times as fast."""
    aged = {
        name: value // 1000
        for name, value in runtime.SERVER_OPTIONS
        if name.startswith("grpc.max_connection_age")
    }
    assert 0 < aged["grpc.max_connection_age_ms"] < 1000
    assert await through_a_long_call(aged, call_s=1.5) == (grpc.StatusCode.OK, "")
    cut = await through_a_long_call({**aged, "grpc.max_connection_age_grace_ms": 30}, call_s=1.5)
    assert cut == (grpc.StatusCode.UNAVAILABLE, "max connection age")
