"""Streams that a server refuses: tried again by our own clients, and never left hanging."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from servers.errors import ErrorInterceptor
from tests.servers.fake_services import Fakes, stages
from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax.cascade import SearchQuery
from tte_jax.client import AsyncClient, Client, RemoteReasoner
from tte_jax.client.retries import MAX_ATTEMPTS, Attempts
from tte_jax.content import Content, Side
from tte_jax.errors import InternalError, OverloadedError, UnavailableError
from tte_jax.stages import ReasonItem

QUERY = SearchQuery(Content.of("a"), deadline_s=20.0)
DOWN = UnavailableError("draining")

Search = Callable[[str], Awaitable[Any]]


class Gateway(retrieval_pb2_grpc.RetrievalServiceServicer):
    """Refuses the first searches with `errors`; answers the others."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def Search(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        yield retrieval_pb2.SearchResponse(stage=retrieval_pb2.SEARCH_STAGE_FIRST_STAGE, final=True)


async def started(gateway: Gateway) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def with_asyncio(address: str) -> Any:
    async with AsyncClient(address) as client:
        return await client.search_final(QUERY)


async def blocking(address: str) -> Any:
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Any] = loop.create_future()

    def search() -> None:
        with Client(address) as client:
            try:
                answer = client.search_final(QUERY)
            except Exception as error:
                loop.call_soon_threadsafe(outcome.set_exception, error)
            else:
                loop.call_soon_threadsafe(outcome.set_result, answer)

    # Not the loop's pool: a search that hangs must fail its test, not hold up the run's end.
    threading.Thread(target=search, daemon=True).start()
    return await outcome


@pytest.mark.parametrize("search", [with_asyncio, blocking])
@pytest.mark.parametrize(
    ("errors", "outcome", "calls"),
    [
        ([DOWN] * (MAX_ATTEMPTS - 1), None, MAX_ATTEMPTS),
        ([DOWN] * (MAX_ATTEMPTS + 1), UnavailableError, MAX_ATTEMPTS),
        ([OverloadedError("full")], OverloadedError, 1),
        ([InternalError("NaN")], InternalError, 1),
    ],
    ids=["comes back", "stays away", "full", "broken"],
)
async def test_a_refused_search(
    search: Search, errors: list[Exception], outcome: type[Exception] | None, calls: int
) -> None:
    gateway = Gateway(*errors)
    server, address = await started(gateway)
    if outcome is None:
        assert (await search(address)).final
    else:
        with pytest.raises(outcome):
            await search(address)
    await server.stop(0)
    assert gateway.calls == calls


@pytest.mark.parametrize("search", [with_asyncio, blocking])
async def test_a_server_that_refuses_and_goes_away_leaves_nobody_hanging(search: Search) -> None:
    gateway = Gateway(*[DOWN] * 100)
    server, address = await started(gateway)
    searching = asyncio.ensure_future(search(address))
    while not gateway.calls:
        await asyncio.sleep(0.001)
    await server.stop(0)
    async with asyncio.timeout(60):  # a hang is what this is about
        with pytest.raises(UnavailableError, match=address):
            await searching


async def test_a_reasoner_that_comes_back_is_asked_again() -> None:
    fakes = Fakes()
    fakes.reasoner.errors = [DOWN, DOWN]
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        item = ReasonItem(Content.of("a"), Side.QUERY)
        (answer,), _ = await reasoner.reason([item], max_tokens=4, timeout_s=20.0)
        await reasoner.close()
    assert answer.text and fakes.reasoner.calls == 3


def test_attempts_end_with_the_time() -> None:
    assert Attempts(0.01).pause_after(DOWN) is None
    attempts = Attempts(None)
    pauses = [attempts.pause_after(DOWN) for _ in range(MAX_ATTEMPTS)]
    assert attempts.timeout_s is None and pauses.pop() is None
    assert [round(pause / 0.1 / 2**i) for i, pause in enumerate(pauses) if pause] == [1, 1, 1]
