"""The supervisor over real processes: order, restarts, hangs, shutdown, no orphans."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from servers import runtime
from servers.settings import SERVICES, parse
from servers.supervisor import Child, Spec, Supervisor, system_specs
from servers.supervisor import ready as all_ready
from tests.servers import echo
from tte.v1 import embedder_pb2_grpc
from tte_jax import system_state
from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.system_state import SystemState

T = TypeVar("T")
PATIENCE_S = 40  # generous: only a broken supervisor uses it up


def until(condition: Callable[[], T], what: str) -> T:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"waited {PATIENCE_S} s for {what}")


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie runs no more


def ready(data_dir: Path) -> SystemState | None:
    state = system_state.read(data_dir)
    return state if state and state.ready else None


@contextmanager
def system(data_dir: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.servers.echo_system", str(data_dir), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def embed(address: str) -> float:
    with grpc.insecure_channel(address) as channel:
        stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
        return len(stub.Embed(echo.request("abc"), timeout=10).embeddings)


def test_life_of_a_system(tmp_path: Path) -> None:
    with system(tmp_path) as process:
        state = until(lambda: ready(tmp_path), "both services")
        assert state.pid == process.pid
        first, second = (state.service(name) for name in ("first", "second"))
        assert embed(first.address) == embed(second.address) == 1
        assert "is serving" in Path(first.log).read_text()
        starts = [Path(f"/proc/{s.pid}/stat").read_text().split()[21] for s in (first, second)]
        assert int(starts[0]) < int(starts[1])  # the gateway waits for its stages

        # A killed child comes back, on the same address, with another process.
        os.kill(first.pid, signal.SIGKILL)

        def back() -> SystemState | None:
            state = ready(tmp_path)
            return state if state and state.service("first").pid != first.pid else None

        state = until(back, "the restart")
        assert state.service("first").restarts == 1 and state.service("second").restarts == 0
        assert state.service("second").pid == second.pid
        assert embed(first.address) == 1

        # One that hangs (here: is stopped) is killed and comes back too.
        hung = state.service("first").pid
        os.kill(hung, signal.SIGSTOP)
        until(lambda: not alive(hung), "the end of the hung child")
        state = until(lambda: (s := ready(tmp_path)) and s.service("first").pid != hung and s, "it")

        pids = [s.pid for s in state.services]
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
        assert not any(alive(pid) for pid in pids)
        assert system_state.read(tmp_path) is None and not (tmp_path / "system.json").exists()
        assert "drains" in Path(second.log).read_text()


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreconditionError, match="file/data cannot be written: Not a directory"):
        with system_state.lock(tmp_path / "file" / "data"):
            pass


def test_a_full_disk_stops_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[SystemState] = []
    specs = [Spec("gateway", (), "127.0.0.1:1", 0)]
    supervisor = Supervisor(specs, data_dir=tmp_path, changed=seen.append)
    (child,) = supervisor._children
    write = system_state.write

    def full(data_dir: Path, state: SystemState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system_state, "write", full)
    supervisor._set(child, "unhealthy")
    assert [s.services[0].state for s in seen] == ["unhealthy"] and "No space left" in caplog.text
    # The same state is written as soon as that works.
    monkeypatch.setattr(system_state, "write", write)
    supervisor._set(child, "unhealthy")
    assert json.loads((tmp_path / "system.json").read_text())["services"][0]["state"] == "unhealthy"


def test_a_gateway_counts_when_it_served_after_its_stages_came_back(tmp_path: Path) -> None:
    stages = [Child(Spec(n, (), "", 0), tmp_path, "serving", since=5.0) for n in "ab"]
    above = Child(Spec("gateway", (), "", 1), tmp_path, "serving", since=6.0, confirmed=7.0)
    system = [*stages, above]
    assert all_ready(system)
    stages[1].state = "restarting"
    assert not all_ready(system)
    stages[1].state, stages[1].since = "serving", 8.0
    assert not all_ready(system)  # it said so before
    above.confirmed = 8.5
    assert all_ready(system)


def test_no_child_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with system(tmp_path) as process:
        pids = [s.pid for s in until(lambda: ready(tmp_path), "both services").services]
        assert all(alive(pid) for pid in pids)
        process.kill()
        # Children are told when the thread that started them ends; the lock goes with the last one.
        process.wait(PATIENCE_S)
        until(lambda: not any(alive(pid) for pid in pids), "the children's end")
        # The file is still there, but nobody holds the lock: the system does not run.
        assert (tmp_path / "system.json").exists() and system_state.read(tmp_path) is None


def test_two_systems_do_not_share_a_data_directory(tmp_path: Path) -> None:
    with system(tmp_path) as running:
        until(lambda: ready(tmp_path), "both services")
        with system(tmp_path) as refused:
            _, said = refused.communicate(timeout=PATIENCE_S)
            assert refused.returncode == 3
        assert f"runs with {tmp_path} already (process {running.pid})" in said
        assert ready(tmp_path)


def test_a_child_that_cannot_start_ends_the_system_and_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with system(tmp_path, str(port)) as process:
            _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == runtime.EXIT_PORT_IN_USE
    assert "first ended with exit code 98" in said and f"port {port} of 127.0.0.1" in said


def test_the_specs_connect_the_gateway_with_its_stages(tmp_path: Path) -> None:
    specs = {s.name: s for s in system_specs(parse(["all", "--port=0"], {}))}
    assert list(specs) == list(SERVICES)
    assert len({s.address for s in specs.values()} | {s.metrics for s in specs.values()}) == 10
    command = specs["gateway"].command
    gateway = parse(command[command.index("gateway") :], {})
    assert [gateway.address_of(n) for n in SERVICES[:-1]] == [
        specs[n].address for n in SERVICES[:-1]
    ]
    assert [specs[n].wave for n in SERVICES] == [0, 0, 0, 0, 1]


def test_the_usual_ports_move_together() -> None:
    ports = [s.address.rpartition(":")[2] for s in system_specs(parse(["all"], {}))]
    assert ports == ["50061", "50062", "50063", "50064", "50060"]
    moved = [s.address.rpartition(":")[2] for s in system_specs(parse(["all", "--port=7000"], {}))]
    assert moved == ["7001", "7002", "7003", "7004", "7000"]


def test_all_does_not_pretend_to_serve_tls() -> None:
    with pytest.raises(InvalidInputError, match="without TLS"):
        system_specs(parse(["all", "--tls-cert=c", "--tls-key=k"], {}))
