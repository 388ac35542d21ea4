"""A model service in this process: a real grpc.aio server over a real tiny model. Its device can be
held, so that a test decides what waits and what runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servers import embedder, reasoner, reranker, runtime
from servers.settings import Settings
from tests import tiny_models
from tte.v1 import (
    content_pb2,
    embedder_pb2,
    embedder_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.engine.batcher import RequestQueue
from tte_jax.engine.inputs import ModelInput
from tte_jax.engine.role import Role
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import EmbedItem, ReasonItem

QUERY = content_pb2.SIDE_QUERY
PATIENCE_S = 30.0  # only something broken uses it up
ASKED = "a red cat"  # the query of every rerank request here

MODULES = {"reasoner": reasoner, "embedder": embedder, "reranker": reranker}
STUBS: dict[str, Callable[[grpc.aio.Channel], Any]] = {
    "reasoner": reasoner_pb2_grpc.ReasonerServiceStub,
    "embedder": embedder_pb2_grpc.EmbedderServiceStub,
    "reranker": reranker_pb2_grpc.RerankerServiceStub,
}
ROLES = tuple(MODULES)


class Device:
    """The role's programs, those of the vision tower apart, behind a gate.

    Attributes:
      entered: how many runs have reached the gate.
      seen: ids [rows, tokens] of each of them, the last one's last.
      poison: a run with this sequence in it raises.
    """

    # Name → which argument has the ids; decoding reads its tokens from the caches.
    PROGRAMS: ClassVar = {"prefill": 1, "embed": 0, "score": 1, "decode": None}

    def __init__(self, role: Role) -> None:
        self.entered = 0
        self.seen: list[np.ndarray] = []
        self.poison: np.ndarray | None = None
        self._inner = role.table.run
        self._held, self._permits = False, 0
        self._changed = threading.Condition()
        setattr(role.table, "run", self._run)  # noqa: B010

    def hold(self) -> None:
        """From now on every run waits for `release`."""
        with self._changed:
            self._held, self._permits = True, 0

    def release(self) -> None:
        """Lets one run through."""
        with self._changed:
            self._permits += 1
            self._changed.notify_all()

    def open(self) -> None:
        """Lets all runs through again."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def saw(self, ids: np.ndarray, *, since: int = 0) -> bool:
        """Whether a run that began after the first `since` had this sequence in it."""
        return any(_holds(batch, ids) for batch in self.seen[since:])

    def _run(self, name: str, key: Any, *arguments: Any) -> Any:
        if name in self.PROGRAMS:
            where = self.PROGRAMS[name]
            ids = np.zeros((0, 0)) if where is None else np.array(arguments[where])
            self.seen.append(ids)
            self.entered += 1
            with self._changed:
                if not self._changed.wait_for(lambda: not self._held or self._permits, PATIENCE_S):
                    raise TimeoutError("a test forgot to let the device go on")
                self._permits -= 1 if self._held else 0
            if self.poison is not None and _holds(ids, self.poison):
                raise RuntimeError("secret: the device does not like this")
        return self._inner(name, key, *arguments)


def _holds(batch: np.ndarray, ids: np.ndarray) -> bool:
    """Whether a row holds the sequence anywhere: several may share one."""
    if len(ids) > batch.shape[1]:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(batch, len(ids), axis=1)
    return bool((windows == ids).all(axis=2).any())


@dataclass
class Served:
    """A running service.

    Attributes:
      role: its role.
      device: the role's programs, to be held.
      address: host:port.
      stop: set it to stop the service as SIGTERM does.
      stopped: ends when it has.
    """

    name: str
    role: Any
    device: Device
    service: runtime.Service
    address: str
    channel: grpc.aio.Channel
    stop: asyncio.Event
    stopped: asyncio.Task[None]

    @property
    def stub(self) -> Any:
        return STUBS[self.name](self.channel)

    def metric(self, name: str) -> float:
        return self.service.metrics[name]()

    async def ask(self, *texts: str, timeout_s: float | None = None) -> list[Any]:
        """What the texts are answered with, one value for each: ECR, vector or score.

        Raises: `grpc.aio.AioRpcError`.
        """
        if self.name == "reasoner":
            call = self.stub.Reason(reason_request(texts), timeout=timeout_s)
            events = [event async for event in call]
            found = {
                e.result.input_index: e.result.reasoning for e in events if e.HasField("result")
            }
            return [found[i].text for i in range(len(texts))]
        if self.name == "embedder":
            answer = await self.stub.Embed(embed_request(texts), timeout=timeout_s)
            return [np.frombuffer(v.data, "<f4") for v in answer.embeddings]
        request = reranker_pb2.RerankRequest(query=ASKED, candidates=texts)
        return list((await self.stub.Rerank(request, timeout=timeout_s)).scores)

    def start(self, *texts: str, timeout_s: float | None = None) -> asyncio.Task[list[Any]]:
        """`ask` as a task; cancelling it cancels the call."""
        return asyncio.create_task(self.ask(*texts, timeout_s=timeout_s))

    def input(self, text: str, *images: bytes) -> ModelInput:
        """What the device sees of an input."""
        content = Content.of(text, *images)
        if self.name == "reasoner":
            return self.role.prepare(ReasonItem(content, Side.QUERY), 20).input
        if self.name == "embedder":
            return self.role.prepare(EmbedItem(content, Side.QUERY)).input
        return self.role.prepare(ASKED, [text])[0].suffix

    def ids(self, text: str) -> np.ndarray:
        return self.input(text).ids

    async def hold_with(self, text: str) -> asyncio.Task[list[Any]]:
        """Occupies the device with a request, so that what follows waits in the queue."""
        self.device.hold()
        before = self.device.entered
        task = self.start(text)
        await until(lambda: self.device.entered > before)
        return task

    async def queued(self, *texts: str) -> list[asyncio.Task[list[Any]]]:
        """Requests of one text each, in the queue in this order."""
        tasks = []
        for text in texts:
            before = len(self.role.queue)
            tasks.append(self.start(text))
            await until(lambda before=before: len(self.role.queue) == before + 1)
        return tasks

    async def health(self) -> int:
        doctor = health_pb2_grpc.HealthStub(self.channel)
        return (await doctor.Check(health_pb2.HealthCheckRequest())).status


def text_content(text: str) -> content_pb2.Content:
    return content_pb2.Content(parts=[content_pb2.Part(text=text)])


def reason_request(texts: Any) -> reasoner_pb2.ReasonRequest:
    inputs = [reasoner_pb2.ReasonInput(content=text_content(t), side=QUERY) for t in texts]
    return reasoner_pb2.ReasonRequest(inputs=inputs, max_tokens=20)


def embed_request(texts: Any) -> embedder_pb2.EmbedRequest:
    inputs = [embedder_pb2.EmbedInput(content=text_content(t), side=QUERY) for t in texts]
    return embedder_pb2.EmbedRequest(inputs=inputs)


@contextlib.asynccontextmanager
async def served(
    name: str, *, queue_entries: int | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """The service of a role while the block runs.

    Args:
      queue_entries: how many inputs may wait; None = as many as usual.
      settings: of the server, as `max_in_flight`.
    """
    kind = {"reasoner": Reasoner, "embedder": Embedder, "reranker": Reranker}[name]
    shared: Role = getattr(tiny_models, name)()
    queue = None if queue_entries is None else RequestQueue(max_entries=queue_entries)
    role = kind(shared.served, queue=queue)
    # Its programs are those of the session's role, which are compiled already.
    role.table._table.update(shared.table._table)
    stop, made = asyncio.Event(), []
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def opened(*_: object) -> Role:
        return role

    async def create(given: Settings) -> runtime.Service:
        made.append(await MODULES[name].create(given))
        return made[0]

    values = {"service": name, "port": 0, "grace_s": 5.0, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES[name], "open_role", opened)
        task = asyncio.create_task(
            runtime.serve(Settings(**values), create, stop=stop, ready=port.set_result)
        )
        await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    device = Device(role)
    address = f"127.0.0.1:{port.result()}"
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(name, role, device, made[0], address, channel, stop, task)
    finally:
        device.open()
        stop.set()
        await task


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "the test waits for something that does not come"
        await asyncio.sleep(0.002)


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
