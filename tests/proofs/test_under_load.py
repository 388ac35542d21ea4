"""Each model service as a real process under random requests: nothing is compiled, nothing is left
behind by callers who hang up, and nothing is lost when it is stopped."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.service_process import ServiceProcess
from benchmarks.traffic import ROLES, STUBS, Request, Traffic, picture
from tests.proofs.running import (
    CANCELS,
    PATIENCE_S,
    REQUESTS,
    compiled_by_jax,
    service,
    until,
)
from tests.proofs.storm import code_of, storm

CLIENTS = 8
PICTURES = [picture(random.Random(seed)) for seed in range(32)]
# Allocators keep pages and arenas, and give them back when they like: readings of an idle reranker
# differ by 15 MiB from storm to storm. A leak of requests would be this much after a hundred
# pictures, and grow with every storm.
MEMORY_SLACK = 24 * 2**20
STORMS = 4
STATE = ("queue_depth", "queue_tokens", "active_slots", "requests_in_flight")


@pytest.fixture(scope="module", params=ROLES)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    with service(request.param, tmp_path_factory.mktemp(request.param)) as started:
        yield started


def held(running: ServiceProcess) -> dict[str, float]:
    """What requests hold while they are there."""
    found = running.metrics()
    return {name: found[f"tte_{name}"] for name in STATE if f"tte_{name}" in found}


async def settled(running: ServiceProcess) -> None:
    await until(lambda: not any(held(running).values()), "the last request's end")


async def load(
    running: ServiceProcess, requests: int, *, seed: int
) -> tuple[Counter[grpc.StatusCode], list[health_pb2.HealthCheckResponse]]:
    """How random requests of several clients ended, and what health said meanwhile."""
    traffic = Traffic(running.role, seed=seed)
    left, codes = iter(range(requests)), Counter()
    health: list[health_pb2.HealthCheckResponse] = []
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub, doctor = STUBS[running.role](channel), health_pb2_grpc.HealthStub(channel)

        async def client() -> None:
            for _ in left:
                codes[await code(traffic.next(), stub)] += 1

        clients = asyncio.gather(*(client() for _ in range(CLIENTS)))
        while not clients.done():
            health.append(await doctor.Check(health_pb2.HealthCheckRequest()))
            await asyncio.sleep(0.02)
        await clients
    return codes, health


async def code(request: Request, stub: object) -> grpc.StatusCode:
    """How a request ended; an answer that is not whole fails."""
    try:
        answers = await request.answers(stub, PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        return code_of(error, request)
    message = request.message
    if request.method == "Reason":
        assert answers[-1].HasField("usage")
        results = [a.result.input_index for a in answers if a.HasField("result")]
        assert sorted(results) == list(range(len(message.inputs)))
    elif request.method == "Embed":
        assert len(answers[0].embeddings) == len(message.inputs)
    elif request.method == "Rerank":
        assert len(answers[0].scores) == len(message.candidates)
    else:
        assert [a.query_id for a in answers] == [m.query_id for m in message]
    return grpc.StatusCode.OK


async def test_random_requests_of_random_shape_compile_nothing(running: ServiceProcess) -> None:
    before, said = running.metrics(), compiled_by_jax(running)
    # The counter and JAX's own log are two accounts of the same thing.
    assert before["tte_compile_count"] == before["tte_warm_compile_count"] == said > 0

    codes, health = await load(running, REQUESTS, seed=1)

    after = running.metrics()
    assert after["tte_compile_count"] == before["tte_compile_count"]
    assert compiled_by_jax(running) == said
    assert sum(codes.values()) == REQUESTS
    # Too long or, where a picture is too large, refused; nothing else went wrong.
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}, codes
    assert codes[grpc.StatusCode.OK] >= REQUESTS / 2
    assert {answer.status for answer in health} == {health_pb2.HealthCheckResponse.SERVING}
    print(f"{running.role}: {dict(codes)}, {said} programs before and after")


async def test_a_storm_of_cancellations_leaves_nothing_behind(running: ServiceProcess) -> None:
    async def once(seed: int) -> Counter[str]:
        ended = await storm(running.address, running.role, CANCELS, seed=seed, pictures=PICTURES)
        await settled(running)
        return ended

    files = running.open_files()
    threads, seed = 0, 1000
    while running.threads() > threads:  # pools start theirs one by one, when all are at work
        threads, seed = running.threads(), seed + 1
        await load(running, 4 * CLIENTS, seed=seed)
    compiled = running.metrics()["tte_compile_count"]
    first = await once(3)
    threads, memory = running.threads(), running.memory_bytes()
    later, readings = [], []
    for number in range(1, STORMS):
        later.append(await once(3 + number))
        readings.append(running.memory_bytes() - memory)

    for ended in (first, *later):
        gone = sum(count for how, count in ended.items() if how.startswith("cancelled"))
        assert sum(ended.values()) == CANCELS and gone >= 0.4 * CANCELS, ended
        # Who stayed was answered, or refused for what it sent.
        stayed = {how for how in ended if not how.startswith("cancelled")}
        assert stayed <= {"OK", "INVALID_ARGUMENT", "over before"}, ended
    await until(lambda: running.open_files() <= files, "closed connections")
    assert running.threads() <= threads
    grown = [f"{reading / 2**20:+.1f}" for reading in readings]
    print(f"{running.role}: {dict(first)}, {dict(later[-1])}; {', '.join(grown)} MiB")
    # From the lower of the first readings: a process may still hold what its start needed.
    assert min(readings[-2:]) - min(0, readings[0]) < MEMORY_SLACK, grown
    # Every place is free again: more at once than there are slots are answered.
    codes, _ = await load(running, 4 * CLIENTS, seed=100)
    assert codes[grpc.StatusCode.OK] >= 2 * CLIENTS
    await settled(running)
    assert running.metrics()["tte_compile_count"] == compiled


async def test_sigterm_under_load_loses_no_request(running: ServiceProcess) -> None:
    traffic = Traffic(running.role, seed=6)
    codes: list[grpc.StatusCode] = []

    async def client() -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = STUBS[running.role](channel)
            while True:
                codes.append(await code(traffic.next(), stub))
                if codes[-1] is grpc.StatusCode.UNAVAILABLE:
                    return

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await until(lambda: len(codes) >= 2 * CLIENTS, "answers")
    running.process.terminate()
    await asyncio.gather(*clients)
    assert await asyncio.to_thread(running.process.wait, PATIENCE_S) == 0
    # What was begun was finished and delivered; the rest was refused in a way that retries take up.
    assert set(codes) <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAVAILABLE,
    }, Counter(codes)
    assert codes.count(grpc.StatusCode.UNAVAILABLE) == CLIENTS
    assert "Traceback" not in running.log.read_text()
