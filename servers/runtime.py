"""The life of a server process: bind, create, warm, serve, drain.

Order at the start: the port is bound (a taken port is found before models are loaded), the service
is created and registered, gRPC starts with health NOT_SERVING, the service warms up, health turns
SERVING and the door opens. Order at the end (SIGTERM or SIGINT): health NOT_SERVING → the drain
delay, in which load balancers look away → new requests refused → running requests end, at most
`grace_s` → the service closes, the device thread last.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from servers.admission import Admission, Door
from servers.errors import ErrorInterceptor
from servers.metrics import Metrics
from servers.settings import Settings
from tte_jax.errors import NotFoundError, TteError
from tte_jax.limits import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

# The asyncio one; the type stubs do not know it.
HealthServicer: Any = health.aio.HealthServicer  # pyright: ignore[reportAttributeAccessIssue]

# A server without callers is closed after this long; retrying ones get ten times as much.
QUIET_S = 0.1

# Cancelled handlers get this long to let go of the service before it is closed.
UNWIND_S = 5.0

EXIT_FAILED = 1
EXIT_CONFIGURATION = 78  # sysexits' EX_CONFIG: starting again cannot help
EXIT_PORT_IN_USE = 98  # Linux' EADDRINUSE

SERVER_OPTIONS = (
    # A message may hold MAX_MESSAGE_BYTES of content; a little more room lets our own check name
    # the field instead of gRPC's RESOURCE_EXHAUSTED, which clients would retry.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + 2**20),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + 2**20),
    ("grpc.keepalive_time_ms", 60_000),
    # Clients that ping every 30 s through a long call must not be sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Long-lived HTTP/2 connections would pin clients to old replicas. Calls under way, which may be
    # an ingest of hours, end in peace on the old connection: there is no limit of grace.
    ("grpc.max_connection_age_ms", 300_000),
    # Two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class Service:
    """What a service gives to the runtime.

    Attributes:
      names: full gRPC service names, e.g. `("tte.v1.EmbedderService",)`; health answers per name.
      register: adds the servicers to the server.
      warm: loads and compiles everything that a request needs; the server says SERVING after it.
        Blocking work belongs on the service's own thread, so that health answers meanwhile.
      close: ends threads and files, the device thread last. Called once, after the last request.
      watch: runs while the service serves, for one that depends on others; calls its argument
        with False to turn health NOT_SERVING, and with True to turn it SERVING again.
      metrics: gauges for `/metrics`, name → a quick function; give `compile_count` and
        `queue_depth` where there are such.
    """

    names: tuple[str, ...]
    register: Callable[[grpc.aio.Server], None]
    warm: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]
    metrics: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    watch: Callable[[Callable[[bool], Awaitable[None]]], Awaitable[None]] | None = None


Create = Callable[[Settings], Awaitable[Service]]


class PortInUseError(Exception):
    """The port to listen on is taken."""

    def __init__(self, host: str, port: int, flag: str = "--port") -> None:
        super().__init__(
            f"port {port} of {host} cannot be used: another program listens on it, or the address "
            f"is not this machine's. Stop that program, or choose another port with {flag}"
        )


async def serve(
    settings: Settings,
    create: Create,
    *,
    stop: asyncio.Event,
    ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Runs a service until `stop` is set, then drains it.

    Args:
      settings: host, ports, limits, grace.
      create: makes the service; called after the port is bound.
      stop: set it to shut down.
      ready: called with the bound port when the service is warm and SERVING.

    Raises:
      PortInUseError: the gRPC or the metrics port is taken.
      TteError: `create` or `warm` found something wrong with what it was given.
    """
    gauges: dict[str, Callable[[], float]] = {}
    admission = Admission(settings.max_in_flight)
    gauges["requests_in_flight"] = lambda: admission.in_flight
    metrics = Metrics(settings.service, gauges)
    # The first is the outermost: metrics count what admission refuses.
    server = grpc.aio.server(
        interceptors=(metrics, admission, ErrorInterceptor()), options=SERVER_OPTIONS
    )
    port = _bind(server, settings)
    http = None
    service = None
    try:
        if settings.metrics_port >= 0:
            try:
                http = metrics.serve(settings.host, settings.metrics_port)
            except OSError:
                raise PortInUseError(
                    settings.host, settings.metrics_port, "--metrics-port"
                ) from None
        service = await create(settings)
        gauges.update(service.metrics)
        status = HealthServicer()
        names = ("", *service.names)
        for name in names:
            await status.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        service.register(server)
        reflection.enable_server_reflection(
            (*service.names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        await server.start()
        log.info("%s listens on %s:%d and warms up", settings.service, settings.host, port)

        async def set_serving(serving: bool) -> None:
            answer = health_pb2.HealthCheckResponse
            for name in names:
                await status.set(name, answer.SERVING if serving else answer.NOT_SERVING)

        if await _unless(stop, service.warm()):
            admission.door = Door.OPEN
            await set_serving(True)
            log.info("%s is serving", settings.service)
            ready(port)
            if service.watch is not None:
                await _unless(stop, service.watch(set_serving))
            await stop.wait()
            await _drain(settings, server, admission, status)
    finally:
        await server.stop(0)  # at once when something went wrong; nothing to do after a drain
        with contextlib.suppress(TimeoutError):  # gRPC does not wait for the handlers it cancels
            await asyncio.wait_for(admission.idle(), UNWIND_S)
        if service is not None:
            await service.close()
        if http is not None:
            http.shutdown()
            http.server_close()


async def _drain(
    settings: Settings,
    server: grpc.aio.Server,
    admission: Admission,
    status: Any,
) -> None:
    log.info("%s drains %d requests", settings.service, admission.in_flight)
    with contextlib.suppress(TimeoutError):  # a health watcher that does not read cannot hold us
        await asyncio.wait_for(status.enter_graceful_shutdown(), 1.0)
    await asyncio.sleep(settings.drain_delay_s)
    admission.door = Door.DRAINING
    # The connections close only when running requests are done and callers have stopped trying: a
    # refusal is UNAVAILABLE with RetryInfo, while a request that meets a closing connection ends as
    # CANCELLED, which no client's retry policy takes up.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(admission.idle(), settings.grace_s)
    await asyncio.sleep(QUIET_S)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(admission.quiet(QUIET_S), 10 * QUIET_S)
    await server.stop(min(settings.grace_s, 1.0))


async def _unless(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Awaits `work` and returns True, or cancels it and returns False when `stop` comes first."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return not stop.is_set()
        return False
    finally:
        for future in (task, stopped):
            if not future.done():
                future.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await future


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    target = f"{settings.host}:{settings.port}"
    try:
        if settings.tls_cert:
            pair = (_read(settings.tls_key, "tls_key"), _read(settings.tls_cert, "tls_cert"))
            port = server.add_secure_port(target, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(target)
    except RuntimeError:
        raise PortInUseError(settings.host, settings.port) from None
    if port == 0:
        raise PortInUseError(settings.host, settings.port)
    return port


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NotFoundError(f"{setting}: {path} cannot be read ({error.strerror})") from None


def die_with_parent(parent_pid: int) -> None:
    """Linux: this process is killed when its parent ends, however that ends. 0 = not asked for.

    SIGKILL, because a hung process would ignore anything milder; stored data survives it.
    """
    if not parent_pid:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before we asked
        sys.exit(EXIT_FAILED)


def run(settings: Settings, create: Create) -> int:
    """Runs a service as this process' whole work; returns the exit code.

    SIGTERM and SIGINT drain; a second one ends at once.
    """
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )

    async def main() -> int:
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(EXIT_FAILED)
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await serve(settings, create, stop=stop)
        except PortInUseError as error:
            return _failed(settings, str(error), EXIT_PORT_IN_USE)
        except TteError as error:
            return _failed(settings, error.message, EXIT_CONFIGURATION)
        except Exception:
            log.exception("%s failed", settings.service)
            return EXIT_FAILED
        return 0

    return asyncio.run(main())


def _failed(settings: Settings, message: str, code: int) -> int:
    print(f"{settings.service}: {message}", file=sys.stderr)
    return code
