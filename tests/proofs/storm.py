"""Many callers most of whom hang up: before their request runs, while it runs, between messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

import grpc

from benchmarks.traffic import STUBS, Request, Traffic

CALLERS = 32
SHARE = 0.7


async def storm(
    address: str, role: str, requests: int, *, seed: int, pictures: list[bytes]
) -> Counter[str]:
    """Sends `requests`, of which `SHARE` are cancelled; returns how they ended.

    Keys: "cancelled in time" (after a random share of what a request usually takes), "cancelled
    between messages" (of a stream), "over before" (it had ended first), and gRPC codes of the rest.
    """
    traffic = Traffic(role, seed=seed, pictures=pictures)
    rng = random.Random(seed)
    ended: Counter[str] = Counter()
    usual_s = 0.05
    left = iter(range(requests))

    async def caller(stub: Any) -> None:
        nonlocal usual_s
        for _ in left:
            request = traffic.next()
            if rng.random() < SHARE:
                ended[await _hang_up(request, stub, rng, usual_s)] += 1
                continue
            began = time.monotonic()
            try:
                await request.answers(stub, 120)
                ended["OK"] += 1
                usual_s += 0.1 * (time.monotonic() - began - usual_s)
            except grpc.aio.AioRpcError as error:
                code = code_of(error, request)
                # What an error says matters only where there should be none.
                refused = code is grpc.StatusCode.INVALID_ARGUMENT
                ended[code.name if refused else f"{code.name}: {error.details()}"] += 1

    options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
    async with contextlib.AsyncExitStack() as stack:
        stubs = []
        for _ in range(4):
            channel = grpc.aio.insecure_channel(address, options=options)
            stubs.append(STUBS[role](await stack.enter_async_context(channel)))
        await asyncio.gather(*(caller(stubs[i % 4]) for i in range(CALLERS)))
    return ended


def code_of(error: grpc.aio.AioRpcError, request: Request) -> grpc.StatusCode:
    """The server's code. grpcio's asyncio client loses it when the server ends a stream into which
    the client is writing (grpc issue 36066); only a refusal ends one so early."""
    lost = (
        error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
    )
    if lost and request.method == "MineNegatives":
        return grpc.StatusCode.INVALID_ARGUMENT
    return error.code()


async def _hang_up(request: Request, stub: Any, rng: random.Random, usual_s: float) -> str:
    call = request.begin(stub, 120)
    if request.method == "Reason" and rng.random() < 0.5:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            for _ in range(rng.randint(1, 4)):
                if await call.read() is grpc.aio.EOF:
                    break
        how = "between messages"
    else:
        reader = asyncio.ensure_future(_drain(call))
        await asyncio.wait({reader}, timeout=rng.uniform(0, usual_s))
        how = "in time"
    done = call.done()
    call.cancel()
    if how == "in time":
        await asyncio.wait({reader})
    return "over before" if done else f"cancelled {how}"


async def _drain(call: Any) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            async for _ in call:
                pass
