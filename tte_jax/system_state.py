"""The file in which a running system says where its services are: `<data dir>/system.json`.

The supervisor writes it and holds `<data dir>/system.lock` while it lives; the command line reads
it. The lock, which the kernel drops with its process, decides whether the file is still true.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tte_jax.errors import PreconditionError

FORMAT = 1


@dataclass(frozen=True)
class ServiceState:
    """One service of a running system.

    Attributes:
      name: `reasoner`, `embedder`, `reranker`, `index` or `gateway`.
      state: `waiting`, `starting`, `serving`, `unhealthy`, `restarting`, `stopping` or `stopped`.
      address: `host:port` of its gRPC server.
      metrics: URL of its metrics, empty when there are none.
      pid: its process, 0 when there is none now.
      restarts: how often it was started again.
      log: path of its log file.
    """

    name: str
    state: str
    address: str
    metrics: str = ""
    pid: int = 0
    restarts: int = 0
    log: str = ""


@dataclass(frozen=True)
class SystemState:
    """A running system: its supervisor's process, and its services in the order of their start.

    Attributes:
      pid: the supervisor; SIGTERM to it stops the system.
      ready: all services are serving.
      services: every service.
    """

    pid: int
    ready: bool
    services: tuple[ServiceState, ...]

    def service(self, name: str) -> ServiceState:
        """The service of that name; KeyError when there is none."""
        for service in self.services:
            if service.name == name:
                return service
        raise KeyError(name)


def read(data_dir: Path) -> SystemState | None:
    """The system that runs with this data directory now, or None."""
    if not _is_locked(data_dir):
        return None
    try:
        raw = json.loads((data_dir / "system.json").read_text())
        if raw.pop("format") != FORMAT:
            return None
        services = tuple(ServiceState(**service) for service in raw.pop("services"))
        return SystemState(services=services, **raw)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it is just starting, or another version wrote it


def write(data_dir: Path, state: SystemState) -> None:
    """Replaces the file at once, so that readers see the old or the new one."""
    path = data_dir / "system.json"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n")
    beside.replace(path)


@contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Held by the supervisor for its whole life; removes the state file at the end.

    Raises:
      PreconditionError: a system runs with this data directory already, or nothing can be written
        there.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        opened = (data_dir / "system.lock").open("a")
    except OSError as error:
        raise PreconditionError(
            f"the data directory {data_dir} cannot be written: {error.strerror or error}. Give"
            " another one with --data-dir",
            reason="DATA_DIRECTORY",
        ) from None
    with opened as file:
        for attempt in range(3):  # a reader holds a shared lock for some microseconds
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 2:
                    running = read(data_dir)
                    process = f" (process {running.pid})" if running else ""
                    raise PreconditionError(
                        f"a system runs with {data_dir} already{process}: stop it, or choose "
                        "another data directory",
                        reason="ALREADY_RUNNING",
                    ) from None
                time.sleep(0.05)
        (data_dir / "system.json").unlink(missing_ok=True)  # of one that was killed
        try:
            yield
        finally:
            (data_dir / "system.json").unlink(missing_ok=True)


def _is_locked(data_dir: Path) -> bool:
    try:
        with (data_dir / "system.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
