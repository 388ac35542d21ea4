"""One model service as a process of its own, seen from outside: health, metrics, memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

START_S = 300.0
STOP_S = 60.0


@dataclass(frozen=True)
class ServiceProcess:
    """A service that serves.

    Attributes:
      role: "reasoner", "embedder" or "reranker".
      process: `python -m servers`.
      address: host:port of its gRPC.
      metrics_url: its `/metrics`; empty when it was started without.
      log: what it writes.
      start_s: seconds from the command to SERVING.
    """

    role: str
    process: subprocess.Popen[bytes]
    address: str
    metrics_url: str
    log: Path
    start_s: float

    def metrics(self) -> dict[str, float]:
        """Gauges without their labels; counters of several labels are added up."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def memory_bytes(self) -> int:
        return private_bytes(self.process.pid)

    def threads(self) -> int:
        return status_field(self.process.pid, "Threads")

    def open_files(self) -> int:
        """File descriptors, sockets included."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def private_bytes(pid: int) -> int:
    """Anonymous memory of a process, in memory or swapped out: what a leak is made of.

    The resident set alone also shrinks when the system takes idle pages away, and grows with mapped
    files that are read again.
    """
    return 1024 * (status_field(pid, "RssAnon") + status_field(pid, "VmSwap"))


def status_field(pid: int, name: str) -> int:
    """A number of `/proc/PID/status`, in its unit (kB for memory)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/status has no {name}")


@contextlib.contextmanager
def start(
    role: str,
    model: Path,
    data: Path,
    *,
    flags: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Iterator[ServiceProcess]:
    """A model service on free ports, once it serves; it is ended afterwards.

    Args:
      data: its data directory, where its log is written.
      flags: for `python -m servers`, as `--compile-cache=DIR`.
      environment: in addition to this process's own.

    Raises:
      RuntimeError: it ended, or did not serve within `START_S`; the message has its last words.
    """
    data.mkdir(parents=True, exist_ok=True)
    metrics_port = free_port()
    command = [sys.executable, "-m", "servers", role, "--port=0", f"--data-dir={data}"]
    command += [f"--{role}-model={model}", f"--metrics-port={metrics_port}", *flags]
    command += [f"--parent-pid={os.getpid()}", "--log-level=INFO"]
    log = data / f"{role}.log"
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
    try:
        while not (found := re.search(r"listens on \S*:(\d+)", log.read_text())):
            _check(process, log, began)
        address = f"127.0.0.1:{found[1]}"
        with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
            while not _serves(channel):
                _check(process, log, began)
        seconds = time.perf_counter() - began
        url = f"http://127.0.0.1:{metrics_port}/metrics"
        yield ServiceProcess(role, process, address, url, log, seconds)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serves(channel: grpc.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    with contextlib.suppress(grpc.RpcError):
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
        return answer.status == health_pb2.HealthCheckResponse.SERVING
    return False


def _check(process: subprocess.Popen[bytes], log: Path, began: float) -> None:
    if process.poll() is not None or time.perf_counter() - began > START_S:
        raise RuntimeError(f"the service did not start:\n{log.read_text()[-2000:]}")
    time.sleep(0.02)
