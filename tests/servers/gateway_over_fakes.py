"""A gateway in this process over fake services, and what its tests share."""

import asyncio
import contextlib

from servers import gateway, runtime
from servers.settings import Settings
from tests.cascade.fakes import ecr
from tests.servers.fake_services import Fakes, stages
from tte_jax.cascade import ItemState
from tte_jax.content import Content, Document

STORED, SKIPPED, FAILED = ItemState.STORED, ItemState.SKIPPED, ItemState.FAILED
STAGES = ("reasoner", "embedder", "index", "reranker")
# By cosine with the ECR's answer `aab`: aab 1, ab .949, abb .8, bbbb .447, cc 0.
BY_COSINE = ["aab", "ab", "abb", "bbbb", "cc"]


@contextlib.asynccontextmanager
async def gateway_over(fakes: Fakes, **settings):
    """The gateway in the servers' runtime over fake stage services. Yields its address."""
    async with stages(fakes) as address:
        async with gateway_at(address, **settings) as served:
            yield served


@contextlib.asynccontextmanager
async def gateway_at(address, **settings):
    stop = asyncio.Event()
    port = asyncio.get_running_loop().create_future()
    addresses = {f"{name}_address": address for name in STAGES}
    values = {"service": "gateway", "port": 0, **addresses, **settings}
    task = asyncio.create_task(
        runtime.serve(Settings(**values), gateway.create, stop=stop, ready=port.set_result)
    )
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield f"127.0.0.1:{port.result()}"
    finally:
        stop.set()
        await task


def corpus() -> Fakes:
    fakes = Fakes()
    fakes.reasoner.table["ask"] = ecr("think of", "aab")
    for id in BY_COSINE:
        fakes.index.put(id, ecr(f"seen {id}", id))
    return fakes


async def collect(updates):
    return [update async for update in updates]


def ids(update):
    return [candidate.id for candidate in update.results]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def docs(*names, **metadata):
    return [Document(name, Content.of(f"text {name}"), metadata) for name in names]


async def stream(items):
    for item in items:
        yield item


def outcome(updates):
    return {r.position: (r.id, r.state) for update in updates for r in update.results}
