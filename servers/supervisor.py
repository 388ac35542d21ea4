"""Runs the five services as child processes: starts, watches, restarts and ends them.

Children start in waves: the stages, and when all of them serve, the gateway. One that dies is
started again after a pause that doubles with each death; one that does not answer its health check
for long is killed first. The end goes backwards: the gateway drains while its stages still serve.
No child outlives the supervisor: each is a process group of its own, ended by SIGTERM and after its
grace by SIGKILL, and each has asked the kernel to be killed when the supervisor is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servers import runtime
from servers.settings import DEFAULT_PORTS, SERVICES, Settings, for_service
from servers.status_view import StatusView
from tte_jax import system_state
from tte_jax.errors import InvalidInputError, TteError
from tte_jax.system_state import ServiceState, SystemState

log = logging.getLogger(__name__)

# Starting again cannot help: the child has said what is wrong.
FINAL_EXITS = (runtime.EXIT_CONFIGURATION, runtime.EXIT_PORT_IN_USE)


@dataclass(frozen=True)
class Spec:
    """A child to keep running.

    Attributes:
      name: for people, logs and the state file.
      command: program and arguments; `--parent-pid=...` is added.
      address: `host:port` at which it answers health checks.
      wave: it is started when every child of lower waves serves.
      metrics: URL of its metrics.
    """

    name: str
    command: tuple[str, ...]
    address: str
    wave: int = 0
    metrics: str = ""


@dataclass(frozen=True)
class Pace:
    """Times of the supervisor, in seconds, and its patience.

    Attributes:
      poll: between health checks while something starts.
      watch: between health checks of a serving child.
      backoff: pause before the first restart; doubles up to `longest_backoff`.
      steady: a child that served this long starts over with the shortest pause.
      hung: a child that answered once and then not for this long is killed.
      grace: from SIGTERM to SIGKILL.
      first_starts: how often a child that never served is started before the supervisor gives up.
    """

    poll: float = 0.1
    watch: float = 1.0
    backoff: float = 0.5
    longest_backoff: float = 30.0
    steady: float = 60.0
    hung: float = 60.0
    grace: float = 45.0
    first_starts: int = 3


@dataclass(eq=False)
class Child:
    """A spec and what has become of it.

    Attributes:
      serving: set while it serves.
      since: when it began to, by the monotonic clock.
      confirmed: when the last health check that it answered with SERVING was sent.
    """

    spec: Spec
    log: Path
    state: str = "waiting"
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    served: bool = False
    serving: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = 0.0
    confirmed: float = 0.0


def ready(children: Sequence[Child]) -> bool:
    """Whether all children serve.

    What a child said before one of a lower wave came back may not hold any more: it counts when
    the child has said it since.
    """
    return all(
        child.state == "serving"
        and all(
            child.confirmed >= other.since
            for other in children
            if other.spec.wave < child.spec.wave
        )
        for child in children
    )


class StartError(Exception):
    """A child cannot start. `code` is its exit code; the message has the end of its log."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Supervisor:
    """Keeps children running until `stop` is set. Must run on the main thread's event loop: Linux
    ties the children's lives to the thread that started them."""

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        data_dir: Path,
        pace: Pace | None = None,
        changed: Callable[[SystemState], None] = lambda state: None,
    ) -> None:
        self._data_dir = data_dir
        self._pace = pace or Pace()
        self._changed = changed
        logs = data_dir / "logs"
        self._children = [Child(spec, logs / f"{spec.name}.log") for spec in specs]
        self._written: SystemState | None = None

    @property
    def state(self) -> SystemState:
        """The system as it is now."""
        services = tuple(
            ServiceState(
                name=child.spec.name,
                state=child.state,
                address=child.spec.address,
                metrics=child.spec.metrics,
                pid=child.process.pid if child.process else 0,
                restarts=child.restarts,
                log=str(child.log),
            )
            for child in self._children
        )
        return SystemState(pid=os.getpid(), ready=ready(self._children), services=services)

    async def run(self, stop: asyncio.Event) -> None:
        """Starts everything, keeps it running until `stop`, ends everything.

        Raises:
          PreconditionError: another supervisor uses the data directory.
          StartError: a child cannot start; everything else was ended.
        """
        with system_state.lock(self._data_dir):
            for child in self._children:
                child.log.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    child.log.replace(child.log.with_suffix(".log.old"))
            stopped = asyncio.create_task(stop.wait())
            keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
            try:
                done, _ = await asyncio.wait(
                    {stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()  # keepers end only by errors
            finally:
                for task in (stopped, *keepers):
                    task.cancel()
                await asyncio.gather(stopped, *keepers, return_exceptions=True)
                await self._end_all()

    async def _keep(self, child: Child) -> None:
        for other in self._children:
            if other.spec.wave < child.spec.wave:
                await other.serving.wait()
        backoff = self._pace.backoff
        starts = 0
        while True:
            starts += 1
            begun = time.monotonic()
            code = await self._run_once(child)
            why = f"{child.spec.name} ended with exit code {code}"
            if not child.served and (code in FINAL_EXITS or starts >= self._pace.first_starts):
                self._set(child, "stopped")
                raise StartError(f"{why} before it served. {_tail(child.log)}", code or 1)
            if time.monotonic() - begun >= self._pace.steady:
                backoff = self._pace.backoff
            log.warning("%s; it is started again in %g s", why, backoff)
            self._set(child, "restarting")
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, self._pace.longest_backoff)
            child.restarts += 1

    async def _run_once(self, child: Child) -> int:
        """Starts the child and returns its exit code when it has ended."""
        with child.log.open("ab") as output:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.command,
                f"--parent-pid={os.getpid()}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # a terminal's Ctrl-C reaches us alone, and we keep the order
            )
        self._set(child, "starting")
        ended = asyncio.create_task(child.process.wait())
        watch = asyncio.create_task(self._watch(child))
        try:
            await asyncio.wait({ended, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():  # the watch gave it up
                _signal_group(child.process.pid, signal.SIGKILL)
            return await ended
        finally:
            watch.cancel()
            ended.cancel()
            await asyncio.gather(watch, ended, return_exceptions=True)
            child.serving.clear()
            if child.process.returncode is not None:
                _signal_group(child.process.pid, signal.SIGKILL)  # what it may have left behind
                child.process = None

    async def _watch(self, child: Child) -> None:
        """Follows the child's health; returns when it has hung."""
        options = (
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.use_local_subchannel_pool", 1),  # no memory of the process before this one
        )
        request = health_pb2.HealthCheckRequest()
        answered = 0.0
        async with grpc.aio.insecure_channel(child.spec.address, options=options) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # its type stub lacks the methods
            while True:
                asked = time.monotonic()
                try:
                    status = (await health.Check(request, timeout=2.0)).status
                    answered = time.monotonic()
                except grpc.aio.AioRpcError:
                    status = None
                if status == health_pb2.HealthCheckResponse.SERVING:
                    child.served = True
                    child.confirmed = asked
                    if not child.serving.is_set():
                        child.since = time.monotonic()
                        child.serving.set()
                    self._set(child, "serving")
                elif child.serving.is_set():
                    child.serving.clear()
                    self._set(child, "unhealthy")
                if answered and time.monotonic() - answered > self._pace.hung:
                    log.error("%s has hung and is killed", child.spec.name)
                    return
                pace = self._pace.watch if child.serving.is_set() else self._pace.poll
                await asyncio.sleep(pace)

    async def _end_all(self) -> None:
        for wave in sorted({c.spec.wave for c in self._children}, reverse=True):
            await asyncio.gather(
                *(self._end(child) for child in self._children if child.spec.wave == wave)
            )

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is not None:
            self._set(child, "stopping")
            _signal_group(process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), self._pace.grace)
            except TimeoutError:
                log.error("%s did not end in %g s and is killed", child.spec.name, self._pace.grace)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()
            child.process = None
        self._set(child, "stopped")

    def _set(self, child: Child, state: str) -> None:
        child.state = state
        now = self.state
        if now != self._written:
            try:
                system_state.write(self._data_dir, now)
            except OSError as error:  # a full disk stops no service; the next change tries again
                log.error("the state in %s cannot be written: %s", self._data_dir, error)
            else:
                self._written = now
            self._changed(now)


def system_specs(settings: Settings) -> list[Spec]:
    """The five services with their ports.

    `settings.port` is the gateway's, and the stages' follow it; 0 = free ports for all.

    Raises:
      InvalidInputError: TLS is asked for, which `all` does not offer.
    """
    if settings.tls_cert:
        raise InvalidInputError(
            "`all` listens on this machine without TLS: start single services to serve TLS",
            field="tls_cert",
        )
    ports = _ports(settings.host, settings.port)
    metrics_ports = _ports(settings.host, max(settings.metrics_port, 0))
    addresses = {f"{name}_address": f"{settings.host}:{ports[name]}" for name in SERVICES[:-1]}
    specs = []
    for name in SERVICES:
        own = for_service(
            settings,
            name,
            port=ports[name],
            metrics_port=metrics_ports[name],
            parent_pid=0,  # each child's is the supervisor's
            **(addresses if name == "gateway" else {}),
        )
        specs.append(
            Spec(
                name=name,
                command=(sys.executable, "-m", "servers", name, *own.flags()),
                address=f"{settings.host}:{ports[name]}",
                wave=int(name == "gateway"),
                metrics=f"http://{settings.host}:{metrics_ports[name]}/metrics",
            )
        )
    return specs


def run(settings: Settings) -> int:
    """`python -m servers all`: runs the system until SIGTERM or SIGINT; returns the exit code."""
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(message)s")
    settings = replace(settings, data_dir=settings.data_dir.absolute())

    async def main() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        grace = settings.drain_delay_s + settings.grace_s + 15
        with StatusView() as view:
            supervisor = Supervisor(
                system_specs(settings),
                data_dir=settings.data_dir,
                pace=Pace(grace=grace),
                changed=view.show,
            )
            await supervisor.run(stop)
        return 0

    try:
        return asyncio.run(main())
    except StartError as error:
        print(f"The system cannot start: {error}", file=sys.stderr)
        return error.code
    except TteError as error:
        print(error.message, file=sys.stderr)
        return runtime.EXIT_CONFIGURATION


def _ports(host: str, first: int) -> dict[str, int]:
    """A port for each service: `first` for the gateway and those after it, or free ones for 0."""
    if first:
        offset = first - DEFAULT_PORTS["gateway"]
        return {name: DEFAULT_PORTS[name] + offset for name in SERVICES}
    with contextlib.ExitStack() as held:
        # All are held until all are chosen, so that they differ.
        sockets = {name: held.enter_context(socket.socket()) for name in SERVICES}
        for each in sockets.values():
            each.bind((host, 0))
        return {name: each.getsockname()[1] for name, each in sockets.items()}


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _tail(path: Path, lines: int = 8) -> str:
    """The end of a log, for a message about a child that did not start."""
    text = path.read_text(errors="replace").strip().splitlines()[-lines:]
    return "\n".join([f"The end of {path}:", *(f"  {line}" for line in text)])
