"""The life of a server: warm-up, admission, errors, metrics, draining. Real gRPC, one process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from servers import runtime
from servers.settings import Settings
from tests.servers import echo
from tte.v1 import embedder_pb2, embedder_pb2_grpc
from tte_jax.errors import NotFoundError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Running:
    echo: echo.Echo
    port: int
    stop: asyncio.Event
    task: asyncio.Task
    stub: object
    health: health_pb2_grpc.HealthStub
    channel: grpc.aio.Channel

    async def check(self, name: str = echo.NAME):
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=name))
        return answer.status


@contextlib.asynccontextmanager
async def running(**settings) -> AsyncIterator[Running]:
    servicer, stop = echo.Echo(), asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    values = {"service": "embedder", "port": 0, "grace_s": 5.0, **settings}
    task = asyncio.create_task(
        runtime.serve(Settings(**values), servicer.service, stop=stop, ready=port.set_result)
    )
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    channel, stub = echo.stub(port.result())
    health = health_pb2_grpc.HealthStub(channel)
    try:
        yield Running(servicer, port.result(), stop, task, stub, health, channel)
    finally:
        servicer.hold.set()
        stop.set()
        await channel.close()
        await task
    assert servicer.closed


async def code_of(call) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    status = rpc_status.from_call(error)
    assert status is not None and status.code == error.code().value[0]
    found = {}
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        found[kind.__name__] = kind()
        packed.Unpack(found[kind.__name__])
    return found


async def test_a_served_request_is_answered_and_health_and_reflection_know_the_service() -> None:
    async with running() as server:
        answer = await server.stub.Embed(echo.request("four"))
        assert answer.embeddings[0].data == b"\x00\x00\x80\x40"  # 4.0 in binary32
        assert [await server.check(n) for n in (echo.NAME, "")] == [SERVING, SERVING]
        reflect = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = [r async for r in reflect.ServerReflectionInfo(iter([asked]))]
        assert echo.NAME in {s.name for s in listed[0].list_services_response.service}


async def test_errors_arrive_with_details_and_without_internals(caplog) -> None:
    async with running() as server:
        with pytest.raises(grpc.aio.AioRpcError) as invalid:
            await server.stub.Embed(echo.request(how="invalid"))
        found = details(invalid.value)
        assert invalid.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert found["BadRequest"].field_violations[0].field == "inputs[0].side"
        assert dict(found["ErrorInfo"].metadata) == {"given": "7"}

        with pytest.raises(grpc.aio.AioRpcError) as overload:
            await server.stub.Embed(echo.request(how="overload"))
        assert details(overload.value)["RetryInfo"].retry_delay.ToMilliseconds() == 250

        with pytest.raises(grpc.aio.AioRpcError) as crash:
            await server.stub.Embed(echo.request(how="fail"))
        assert crash.value.code() is grpc.StatusCode.INTERNAL
        incident = details(crash.value)["ErrorInfo"].metadata["incident"]
        assert "secret" not in str(rpc_status.from_call(crash.value))
        assert incident in caplog.text and "secret detail" in caplog.text

        missing = server.stub.Info(embedder_pb2.EmbedderServiceInfoRequest())
        assert await code_of(missing) is grpc.StatusCode.UNIMPLEMENTED


async def test_a_saturated_server_refuses_requests_and_answers_health() -> None:
    async with running(max_in_flight=2) as server:
        held = [server.stub.Embed(echo.request(how="hold")) for _ in range(2)]
        while server.echo.running < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.stub.Embed(echo.request())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert set(details(refused.value)) == {"ErrorInfo", "RetryInfo"}
        assert await server.check() == SERVING
        server.echo.hold.set()
        assert [len((await h).embeddings) for h in held] == [1, 1]
        assert await code_of(server.stub.Embed(echo.request())) is grpc.StatusCode.OK


async def test_a_cancelled_request_gives_its_place_back() -> None:
    async with running(max_in_flight=1) as server:
        call = server.stub.Embed(echo.request(how="hold"))
        asyncio.ensure_future(code_of(call))
        while not server.echo.running:
            await asyncio.sleep(0.005)
        call.cancel()
        while server.echo.running:
            await asyncio.sleep(0.005)
        assert await code_of(server.stub.Embed(echo.request())) is grpc.StatusCode.OK


async def test_draining_under_load_loses_no_request() -> None:
    async with running() as server:
        codes: list[grpc.StatusCode] = []

        async def client() -> None:
            while not codes or codes[-1] is grpc.StatusCode.OK:
                codes.append(await code_of(server.stub.Embed(echo.request(how="20"))))

        clients = [asyncio.create_task(client()) for _ in range(16)]
        while server.echo.answered < 40:
            await asyncio.sleep(0.005)
        server.stop.set()
        await asyncio.gather(*clients)
        await server.task
        # Whatever was begun was finished and delivered; the rest was refused in a retriable way.
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert codes.count(grpc.StatusCode.OK) == server.echo.answered


async def test_health_turns_before_requests_are_refused_and_running_ones_end() -> None:
    async with running(drain_delay_s=0.2) as server:
        held = asyncio.ensure_future(server.stub.Embed(echo.request(how="hold")))
        while not server.echo.running:
            await asyncio.sleep(0.005)
        server.stop.set()
        while await server.check() != NOT_SERVING:
            await asyncio.sleep(0.005)
        assert await code_of(server.stub.Embed(echo.request())) is grpc.StatusCode.OK
        while (code := await code_of(server.stub.Embed(echo.request()))) is grpc.StatusCode.OK:
            await asyncio.sleep(0.01)
        assert code is grpc.StatusCode.UNAVAILABLE
        server.echo.hold.set()
        assert len((await held).embeddings) == 1
        await server.task


async def test_a_long_request_ends_within_the_grace_and_not_beyond_it() -> None:
    async with running(grace_s=30.0) as server:
        call = asyncio.ensure_future(server.stub.Embed(echo.request(how="1500")))
        while not server.echo.running:
            await asyncio.sleep(0.005)
        server.stop.set()
        assert len((await call).embeddings) == 1
    async with running(grace_s=0.1) as server:
        call = server.stub.Embed(echo.request(how="hold"))
        ended = asyncio.ensure_future(code_of(call))
        while not server.echo.running:
            await asyncio.sleep(0.005)
        server.stop.set()
        await server.task
        assert await ended in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


async def test_requests_wait_for_the_warm_up_and_a_stop_ends_it() -> None:
    servicer, stop, warming = echo.Echo(), asyncio.Event(), asyncio.Event()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def create(settings: Settings) -> runtime.Service:
        service = await servicer.service(settings)

        async def warm() -> None:
            warming.set()
            await asyncio.Event().wait()

        return runtime.Service(service.names, service.register, warm, service.close)

    task = asyncio.create_task(
        runtime.serve(Settings(service="embedder", port=port), create, stop=stop)
    )
    await warming.wait()
    channel, stub = echo.stub(port)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Embed(echo.request())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(refused.value)["ErrorInfo"].reason == "WARMING_UP"
    check = health_pb2.HealthCheckRequest(service=echo.NAME)
    assert (await health_pb2_grpc.HealthStub(channel).Check(check)).status == NOT_SERVING
    stop.set()
    await task
    await channel.close()
    assert servicer.closed


async def test_tls_serves_those_who_trust_the_certificate(tmp_path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    key.write_bytes(pair.private_key_pem.bytes())
    async with running(tls_cert=str(cert), tls_key=str(key)) as server:
        trusting = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", trusting) as channel:
            stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
            assert len((await stub.Embed(echo.request())).embeddings) == 1
        assert await code_of(server.stub.Embed(echo.request())) is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(NotFoundError, match="tls_key: .*missing.pem"):
        async with running(tls_cert=str(cert), tls_key=str(tmp_path / "missing.pem")):
            pass


async def test_metrics_count_requests_by_code_and_read_gauges() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics_port = probe.getsockname()[1]
    async with running(metrics_port=metrics_port) as server:
        await server.stub.Embed(echo.request())
        await code_of(server.stub.Embed(echo.request(how="invalid")))
        await server.check()
        url = f"http://127.0.0.1:{metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    method = 'method="/tte.v1.EmbedderService/Embed"'
    assert f'tte_requests_total{{code="OK",{method}}} 1.0' in page
    assert f'tte_requests_total{{code="INVALID_ARGUMENT",{method}}} 1.0' in page
    assert f"tte_request_seconds_count{{{method}}} 2.0" in page
    assert 'tte_compile_count{service="embedder"} 3.0' in page
    assert "grpc.health" not in page


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_said_and_has_its_exit_code(flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--port": 0, "--metrics-port": -1, flag: port}
        command = [sys.executable, "-m", "tests.servers.echo"]
        command += [f"{name}={value}" for name, value in ports.items()]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == runtime.EXIT_PORT_IN_USE
    assert f"port {port} of 127.0.0.1" in done.stderr and flag in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_ends_the_process_with_zero() -> None:
    command = [sys.executable, "-m", "tests.servers.echo", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "is serving" in line:
                break
        os.kill(process.pid, signal.SIGTERM)
        process.stderr.read()
        assert process.wait() == 0
