"""The five real services as real processes over tiny random models, started by the supervisor."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from servers import runtime
from servers.settings import SERVICES
from tests import compile_cache, tiny_models
from tte_jax import system_state
from tte_jax.cascade import SearchQuery
from tte_jax.cli.inspection import SERVING, Seen, look
from tte_jax.client import Client
from tte_jax.content import Budget, Content, Document
from tte_jax.system_state import SystemState

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 200.0  # generous: only a broken system uses it up
STARTS = 3
# Reasonings of random models are noise of about one byte a token; these fit into every bucket.
BUDGET = Budget(reasoning_tokens=8, candidates=20, rerank_depth=5)
COLOURS = ("red", "green", "blue", "grey")
THINGS = ("cat", "dog", "face", "thing")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def until(condition: Callable[[], T], what: str) -> T:
    """The first true value of `condition`; fails the test when there is none in time."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {PATIENCE_S:.0f} s for {what}")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def command(service: str, *flags: str) -> list[str]:
    """`python -m servers` with the tiny models and the tests' compile cache."""
    return [
        sys.executable,
        *("-m", "servers", service, "--host=127.0.0.1"),
        f"--reasoner-model={tiny_models.vl_dir()}",
        f"--embedder-model={tiny_models.vl_dir()}",
        f"--reranker-model={tiny_models.text_dir()}",
        f"--compile-cache={compile_cache.directory()}",
        f"--parent-pid={os.getpid()}",
        *flags,
    ]


class System:
    """A running system: its supervisor and where its services are.

    Attributes:
      data_dir: corpus, logs and state.
      process: the supervisor.
    """

    def __init__(self, data_dir: Path, process: subprocess.Popen[bytes]) -> None:
        self.data_dir = data_dir
        self.process = process

    @property
    def state(self) -> SystemState:
        state = system_state.read(self.data_dir)
        assert state is not None, "the system does not run"
        return state

    @property
    def addresses(self) -> dict[str, str]:
        return {service.name: service.address for service in self.state.services}

    @property
    def pids(self) -> dict[str, int]:
        return {service.name: service.pid for service in self.state.services}

    def client(self) -> Client:
        return Client(self.addresses["gateway"])

    def ready(self) -> SystemState | None:
        state = system_state.read(self.data_dir)
        return state if state is not None and state.ready else None

    def await_restart(self, service: str, pid: int) -> None:
        """Until the service runs as another process than `pid` and everything serves."""

        def back() -> bool:
            state = self.ready()
            return state is not None and state.service(service).pid not in (0, pid)

        until(back, f"the {service}'s restart")

    def look(self) -> dict[str, Seen]:
        """Health and own account of every service."""
        return {seen.service: seen for seen in look(self.addresses, timeout_s=30.0)}

    def assert_healthy(self) -> None:
        """All services serve, and a search uses them all."""
        found = {name: seen.health for name, seen in self.look().items()}
        assert found == dict.fromkeys(SERVICES, SERVING), found
        with self.client() as client:
            answer = client.search_final(query("a cat"))
        assert answer.results and not answer.degraded, answer.degraded

    def metrics(self, service: str) -> dict[str, float]:
        """The gauges and counters of `/metrics` without their labels' values."""
        with urllib.request.urlopen(self.state.service(service).metrics, timeout=30) as answer:
            text = answer.read().decode()
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def said(self) -> str:
        """Everything that the supervisor and the services wrote."""
        logs = [self.data_dir / "supervisor.log", *sorted((self.data_dir / "logs").glob("*.log"))]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.exists())


@contextlib.contextmanager
def system(data_dir: Path) -> Iterator[System]:
    """The five services on free ports while the block runs; ended after it."""
    process = _started(data_dir)
    try:
        yield System(data_dir, process)
    finally:
        _end(process)


def _started(data_dir: Path, starts: int = STARTS) -> subprocess.Popen[bytes]:
    """The supervisor of a system that serves."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "supervisor.log").open("wb") as log:
        process = subprocess.Popen(
            command("all", "--port=0", f"--data-dir={data_dir}", "--grace-s=5"),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    system = System(data_dir, process)
    try:
        until(lambda: system.ready() or process.poll() is not None, "the services")
        if process.poll() is None:
            return process
        # Free ports are chosen before they are used: something else may have come in between.
        assert process.returncode == runtime.EXIT_PORT_IN_USE and starts > 1, system.said()
    except BaseException:
        _end(process)
        raise
    return _started(data_dir, starts - 1)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()  # the services end with it
            process.wait()


def picture(rng: random.Random) -> bytes:
    """A noise image of random size, shape and file format; at most four times as long as wide:
    longer ones do not fit into the four vision tokens of the tiny models."""
    width, height = rng.randint(40, 160), rng.randint(40, 160)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, rng.choice(FORMATS))
    return out.getvalue()


def query(text: str = "", *images: bytes, deadline_s: float | None = 120.0) -> SearchQuery:
    return SearchQuery(Content.of(text, *images), budget=BUDGET, deadline_s=deadline_s)


def documents(count: int, *, prefix: str = "doc", seed: int = 0) -> list[Document]:
    """Pictures, texts and both, with metadata `colour`, `size` and `kept`."""
    rng = random.Random(f"{prefix}{seed}")
    made = []
    for number in range(count):
        text = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}" if number % 3 else ""
        images = () if number % 3 == 1 else (picture(rng),)
        metadata = {"colour": COLOURS[number % 4], "size": number, "kept": number % 2 == 0}
        made.append(Document(f"{prefix}-{number}", Content.of(text, *images), metadata))
    return made
