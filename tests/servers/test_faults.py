"""What goes wrong around a request stays there: faults of docs/architecture.md over real gRPC and
real models, for each of the three model services."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from benchmarks.traffic import picture
from tests.proofs.storm import storm
from tests.servers.served_role import (
    QUERY,
    ROLES,
    Served,
    error_of,
    reason_request,
    served,
    text_content,
    until,
)
from tte.v1 import embedder_pb2, reasoner_pb2, reranker_pb2
from tte_jax.engine.batcher import Entry
from tte_jax.engine.packing import most_sequences

each_role = pytest.mark.parametrize("name", ROLES)
OVERLOADED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
# About equally long, so that they may run as one batch.
MATES = ("a dog", "a face", "the thing", "dark red")


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """ErrorInfo's reason, and whether there is a RetryInfo."""
    reason, retry = "", False
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            reason = info.reason
        retry |= detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return reason, retry


@pytest.fixture
async def server(name: str) -> AsyncIterator[Served]:
    async with served(name) as running:
        yield running
        await until(lambda: not len(running.role.queue))
        assert running.metric("queue_tokens") == 0


def same(found: list[object], expected: list[object]) -> bool:
    return all(np.allclose(a, b, atol=1e-5) if not isinstance(a, str) else a == b
               for a, b in zip(found, expected, strict=True))  # fmt: skip


@each_role
async def test_cancelling_one_caller_on_the_device_leaves_its_batch_mates_alone(server) -> None:
    mates = MATES[:3]  # beside the one that decodes meanwhile, all slots of the reasoner
    expected = [(await server.ask(text))[0] for text in mates]
    first = await server.hold_with("a cat")
    calls = await server.queued(*mates)
    since = server.device.entered
    ids = [server.ids(text) for text in mates]
    while not server.device.saw(ids[0], since=since):  # decode steps of the first come between
        before = server.device.entered
        server.device.release()
        await until(lambda before=before: server.device.entered > before)
    # All are on the device, in one batch; the second hangs up there.
    now = server.device.entered - 1
    assert all(server.device.saw(one, since=now) for one in ids)
    calls[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[1]
    await asyncio.sleep(0.1)  # until the server has heard of it
    server.device.open()
    assert await first
    assert same([(await calls[i])[0] for i in (0, 2)], [expected[0], expected[2]])
    assert same(await server.ask(mates[1]), expected[1:2])


@each_role
async def test_a_poisoned_input_fails_alone(server) -> None:
    expected = [(await server.ask(text))[0] for text in MATES]
    first = await server.hold_with("a cat")
    server.device.poison = server.ids(MATES[1])
    calls = await server.queued(*MATES)
    server.device.open()
    assert await first
    error = await error_of(calls[1])
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(rpc_status.from_call(error))
    assert same([(await calls[i])[0] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])
    # A request of several inputs that has it fails, and the next one is served.
    assert (await error_of(server.ask(*MATES))).code() is grpc.StatusCode.INTERNAL
    assert same(await server.ask(MATES[0], MATES[3]), [expected[0], expected[3]])


@pytest.mark.parametrize("name", ["reasoner"])
async def test_hanging_up_during_decoding_frees_the_slots_within_one_step(server) -> None:
    slots, device = server.role.served.buckets.slots, server.device
    (expected,) = await server.ask("a cat")
    device.hold()
    before = device.entered
    call = server.stub.Reason(reason_request(["a dog"] * slots))
    for run in (1, 2):  # the prefill, then the first decode step, which stays on the device
        await until(lambda run=run: device.entered == before + run)
        if run == 1:
            device.release()
    assert (await call.read()).delta.tokens == 1
    assert server.metric("active_slots") == slots
    call.cancel()
    await until(lambda: all(o.entry.dead for o in server.role.loop._slots))
    device.release()
    await until(lambda: server.metric("active_slots") == 0)
    assert device.entered == before + 2  # no other step was run for them
    device.open()
    assert await server.ask("a cat") == [expected]


@each_role
async def test_what_expires_in_the_queue_never_reaches_the_device(server) -> None:
    first = await server.hold_with("a cat")
    dropped = server.metric("queue_expired") + server.metric("queue_cancelled")
    (late,) = (server.start("a dog", timeout_s=0.3),)
    await until(lambda: len(server.role.queue) == 1)
    assert (await error_of(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    since = server.device.entered
    server.device.open()
    assert await first
    assert await server.ask("a face")
    assert not server.device.saw(server.ids("a dog"), since=since)
    assert server.metric("queue_expired") + server.metric("queue_cancelled") == dropped + 1


@each_role
async def test_a_saturated_service_refuses_with_a_time_and_health_answers(name: str) -> None:
    async with served(name, max_in_flight=2) as server:
        first = await server.hold_with("a cat")
        (second,) = await server.queued("a dog")
        error = await error_of(server.ask("a face"))
        assert error.code() is OVERLOADED and reason_of(error) == ("OVERLOADED", True)
        for _ in range(20):
            assert await server.health() == health_pb2.HealthCheckResponse.SERVING
        server.device.open()
        assert await first and await second
        assert await server.ask("a face")


@each_role
async def test_one_request_of_many_and_many_of_one_meet_the_same_bound(name: str) -> None:
    async with served(name, queue_entries=4) as server:
        for waiting, fits in ((0, 4), (1, 3), (3, 1)):
            first = await server.hold_with("a cat")
            before = await server.queued(*MATES[:waiting])
            # As one request: what fits is admitted, one more is not.
            error = await error_of(server.ask(*["a dog"] * (fits + 1)))
            if waiting:
                assert error.code() is OVERLOADED and reason_of(error) == ("OVERLOADED", True)
            else:
                assert reason_of(error)[0] == "BATCH_TOO_LARGE"  # not even the empty queue holds it
            together = server.start(*["a dog"] * fits)
            await until(lambda: len(server.role.queue) == 4)
            assert (await error_of(server.ask("a dog"))).code() is OVERLOADED
            server.device.open()
            await asyncio.gather(first, together, *before)
            # One by one: as many, and then no more.
            first = await server.hold_with("a cat")
            before = await server.queued(*MATES[:waiting])
            singles = await server.queued(*["a dog"] * fits)
            assert (await error_of(server.ask("a dog"))).code() is OVERLOADED
            server.device.open()
            await asyncio.gather(first, *before, *singles)


@each_role
async def test_a_request_far_above_the_queue_is_a_clear_error(name: str) -> None:
    async with served(name, queue_entries=4) as server:
        most = 256 if name == "reranker" else 64
        for count in (5, most):
            error = await error_of(server.ask(*["a dog"] * count))
            assert error.code() is INVALID
            assert reason_of(error) == ("BATCH_TOO_LARGE", False)  # sending it again cannot help
            assert f"{count} inputs" in error.details()
        error = await error_of(server.ask(*["a dog"] * 1000))
        assert error.code() is INVALID and str(most) in error.details()
        assert len(await server.ask("a dog", "a cat")) == 2
        assert len(server.role.queue) == 0


@each_role
async def test_what_is_not_a_number_is_an_error_of_its_own_request(server) -> None:
    good = await server.ask("a dog", "a cat")
    if server.name == "reranker":
        bad = "the other query"
        (job,) = server.role.prepare(bad, ["a dog"])
        kv, _ = server.role._prefix(job)
        spoilt = replace(kv, k=np.full(kv.k.shape, np.nan, np.float32))
        server.role.prefix_cache.put(job.prefix_key, spoilt)
        call = server.stub.Rerank(reranker_pb2.RerankRequest(query=bad, candidates=["a dog"]))
    else:
        data = picture(random.Random(1))
        content = text_content("red")
        content.parts.add().image.data = data
        (image,) = server.input("red", data).images
        features = np.full((len(image.patches) // 4, 64), np.nan, np.float32)
        server.role.vision.cache.put(image.key, features)
        if server.name == "embedder":
            one = embedder_pb2.EmbedInput(content=content, side=QUERY)
            call = server.stub.Embed(embedder_pb2.EmbedRequest(inputs=[one]))
        else:
            one = reasoner_pb2.ReasonInput(content=content, side=QUERY)
            call = server.stub.Reason(reasoner_pb2.ReasonRequest(inputs=[one]))
    error = await error_of(_all(call))
    assert error.code() is grpc.StatusCode.INTERNAL and reason_of(error)[0] == "NAN"
    assert same(await server.ask("a dog", "a cat"), good)


async def _all(call) -> None:
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        await call
    else:
        async for _ in call:
            pass


@each_role
async def test_the_event_loop_goes_on_while_the_device_is_busy(server) -> None:
    first = await server.hold_with("a cat")
    (waiting,) = await server.queued("a dog")
    # The device is in the middle of a run that does not end; everything else is answered.
    for _ in range(50):
        assert await server.health() == health_pb2.HealthCheckResponse.SERVING
    assert (await error_of(server.ask("red " * 500))).code() is INVALID  # the host's work too
    assert not first.done() and not waiting.done()
    server.device.open()
    await asyncio.gather(first, waiting)


@each_role
async def test_a_clock_that_jumps_expires_nothing(server, monkeypatch) -> None:
    first = await server.hold_with("a cat")
    calls = [server.start(text, timeout_s=120) for text in MATES]
    await until(lambda: len(server.role.queue) == len(MATES))
    now = time.time()
    for hours in (-24, 24):  # while they wait
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        await asyncio.sleep(0.05)
    server.device.open()
    assert all(await asyncio.gather(first, *calls))
    assert server.metric("queue_expired") == server.metric("queue_cancelled") == 0


def alive() -> Counter[str]:
    """Live objects that belong to requests; the callers that the test itself ran are not among
    them (grpcio keeps a few of a closed channel for a while), nor is what other loops of this
    process do (a system that another module's tests share asks after its stages in a thread)."""
    gc.collect()
    loop = asyncio.get_running_loop()
    return Counter(kind for o in gc.get_objects() if (kind := _of_a_request(o, loop)))


def _of_a_request(o: object, loop: asyncio.AbstractEventLoop) -> str | None:
    if isinstance(o, Entry):
        return "entry"
    if isinstance(o, asyncio.Future) and o.get_loop() is not loop:
        return None
    if isinstance(o, asyncio.Task):
        coroutine = getattr(o.get_coro(), "__qualname__", None) or ""
        return None if coroutine.startswith(storm.__name__) else "task"
    return "future" if type(o) in (asyncio.Future, Future) else None


async def settled() -> Counter[str]:
    """`alive()` when it goes down no more: what was cancelled takes its time to unwind."""
    least, since = alive(), time.monotonic()
    while time.monotonic() < since + 1:
        await asyncio.sleep(0.1)
        if (now := alive()).total() < least.total():
            least, since = now, time.monotonic()
    return least


@each_role
async def test_after_a_storm_of_cancellations_no_object_of_a_request_is_left(server) -> None:
    pictures = [picture(random.Random(seed)) for seed in range(8)]

    async def once(seed: int) -> Counter[str]:
        ended = await storm(server.address, server.name, 60, seed=seed, pictures=pictures)
        assert sum(n for how, n in ended.items() if how.startswith("cancelled")) >= 20
        await until(lambda: not len(server.role.queue))
        if server.name == "reasoner":
            await until(lambda: server.role.loop.active == 0)
        return await settled()

    buckets = server.role.served.buckets
    rows = {  # the last batch is remembered
        "embedder": max(b * most_sequences(t) for b, t in buckets.embed),
        "reranker": max((n for n, _ in buckets.score), default=0),
        "reasoner": buckets.slots,
    }[server.name]
    first, second = await once(1), await once(2)
    assert all(second[kind] <= first[kind] + rows for kind in second), (first, second)
