"""What gRPC costs: a mixed load through the services and in process, a hop, and two starts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.engine.embedding import inputs
from benchmarks.engine.reranking import WORDS
from benchmarks.engine.rounds import row, spread
from benchmarks.service_process import start
from tte.v1 import embedder_pb2, embedder_pb2_grpc
from tte_jax.client.stages import RemoteEmbedder, RemoteReasoner, RemoteReranker
from tte_jax.content import Side
from tte_jax.embedder import Embedder
from tte_jax.local import LocalEmbedder, LocalReasoner, LocalReranker
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import ReasonItem

ROLES = ("reasoner", "embedder", "reranker")
CANDIDATES = 10
TOKENS = 24
HOPS = 2000
Call = Callable[[], Awaitable[Any]]


async def load(
    models: Mapping[str, Path],
    *,
    clients: int,
    requests: int,
    rounds: int,
    largest: int,
    compiled: Path,
) -> dict[str, Any]:
    """`requests` of `clients` at once: a third each of reasonings, embeddings and rerankings.

    Args:
      compiled: the compile cache that this process uses already; the services use it too.
    """
    seconds: dict[str, list[float]] = {"grpc": [], "in process": []}
    fresh = itertools.count()
    with tempfile.TemporaryDirectory(prefix="tte-bench-") as cache:
        roles = (
            Reasoner.from_pretrained(models["reasoner"]),
            Embedder.from_pretrained(models["embedder"]),
            Reranker.from_pretrained(models["reranker"]),
        )
        for role in roles:
            await asyncio.to_thread(role.warmup)
        local = (LocalReasoner(roles[0]), LocalEmbedder(roles[1]), LocalReranker(roles[2]))
        async with contextlib.AsyncExitStack() as stack:
            addresses = {
                role: stack.enter_context(
                    start(role, models[role], Path(cache), flags=[f"--compile-cache={compiled}"])
                ).address
                for role in ROLES
            }
            remote = (
                RemoteReasoner(addresses["reasoner"]),
                RemoteEmbedder(addresses["embedder"]),
                RemoteReranker(addresses["reranker"]),
            )
            for stage in remote:
                stack.push_async_callback(stage.close)
            for turn in range(rounds + 1):
                for name, stages in (("grpc", remote), ("in process", local)):
                    calls = _calls(stages, requests, largest, seed=next(fresh))
                    began = time.perf_counter()
                    await _all(calls, clients)
                    if turn:
                        seconds[name].append(time.perf_counter() - began)
            hops = await _hops(addresses["embedder"])
        for role in roles:
            role.close()
    share = float(np.median([a / b for a, b in zip(*seconds.values(), strict=True)]))
    p50, p99 = (float(x) for x in np.quantile(hops, (0.5, 0.99)) * 1000)
    return {
        "clients": clients,
        "requests": requests,
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "hop_ms": {"p50": round(p50, 3), "p99": round(p99, 3)},
        "rows": [
            row(
                f"mixed load of {clients} clients through gRPC, of the engine in process",
                round(1 / share, 3),
                0.9,
                " ×",
            ),
            row("hop without work, p50", round(p50, 2), 1.5, " ms", most=True),
            row("hop without work, p99", round(p99, 2), 5.0, " ms", most=True),
        ],
    }


def starts(model: Path) -> dict[str, Any]:
    """Seconds until an embedder serves: nothing compiled yet, and then all of it."""
    with tempfile.TemporaryDirectory(prefix="tte-bench-") as cache:
        seconds = []
        for _ in range(2):
            with start("embedder", model, Path(cache)) as server:
                seconds.append(server.start_s)
    share = round(seconds[1] / seconds[0], 3)
    return {
        "seconds": [round(s, 2) for s in seconds],
        "rows": [row("second start, of the first", share, 0.3, " ×", most=True)],
    }


def _calls(stages: Any, count: int, largest: int, *, seed: int) -> list[Call]:
    """New requests each time: nothing of them is in a cache."""
    reasoner, embedder, reranker = stages
    rng = np.random.default_rng(seed)
    calls: list[Call] = []
    for i, item in enumerate(inputs(count, largest=largest, seed=seed)):
        if i % 3 == 0:
            one = ReasonItem(item.content, Side.QUERY)
            calls.append(lambda one=one: reasoner.reason([one], max_tokens=TOKENS))
        elif i % 3 == 1:
            calls.append(lambda item=item: embedder.embed([item]))
        else:
            query, *texts = (" ".join(rng.choice(WORDS, 12)) for _ in range(CANDIDATES + 1))
            calls.append(lambda q=query, t=texts: reranker.rerank(q, t))
    return calls


async def _all(calls: list[Call], clients: int) -> None:
    left = iter(calls)

    async def work() -> None:
        for call in left:
            await call()

    await asyncio.gather(*(work() for _ in range(clients)))


async def _hops(address: str) -> np.ndarray:
    """Seconds of calls that touch no model, one after the other."""
    async with _channel(address) as channel:
        stub: Any = embedder_pb2_grpc.EmbedderServiceStub(channel)
        request = embedder_pb2.EmbedderServiceInfoRequest()
        seconds = []
        for i in range(HOPS + 50):
            began = time.perf_counter()
            await stub.Info(request)
            if i >= 50:
                seconds.append(time.perf_counter() - began)
    return np.array(seconds)


@contextlib.asynccontextmanager
async def _channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel
