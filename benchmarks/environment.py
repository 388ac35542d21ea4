"""What a figure was measured on: machine, versions, commit, and how idle the machine was."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "grpcio", "scann", "numpy", "transformers")
# Above this share of the machine at work for others, a figure says more about them than about us.
NOISY_LOAD = 0.15


def describe(module: str, arguments: list[str] | None = None) -> dict[str, Any]:
    """{"command", "date", "commit", "versions", "machine"} of a result of `module`."""
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", module, *given]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """{"cpu", "cores", "memory_gb", "system"}; cores are those that this process may use."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def busy_share(before: str, after: str) -> float:
    """Share of all cores' time, 0 to 1, at work between two readings of `/proc/stat`.

    Time stolen by the host counts as work: it was not there for us either. Waiting for a disk does
    not. Raises ValueError when the readings are not of `/proc/stat` or no time lies between them.
    """
    first, second = _ticks(before), _ticks(after)
    total = sum(second) - sum(first)
    if total <= 0:
        raise ValueError("no time has passed between the two readings of /proc/stat")
    idle = second[3] + second[4] - first[3] - first[4]  # idle and iowait
    return min(max(1 - idle / total, 0.0), 1.0)


def foreign_load(seconds: float = 3.0) -> float:
    """`busy_share` of the next seconds; call it while the system under test has nothing to do."""
    stat = Path("/proc/stat")
    before = stat.read_text()
    time.sleep(seconds)
    return round(busy_share(before, stat.read_text()), 3)


def noisy(*loads: float) -> bool:
    """Whether any of the loads is too much for a figure to be trusted."""
    return any(load > NOISY_LOAD for load in loads)


def _ticks(stat: str) -> list[int]:
    name, *fields = stat.splitlines()[0].split()
    if name != "cpu" or len(fields) < 8:
        raise ValueError(f"expected the line `cpu …` of /proc/stat, got {stat.splitlines()[0]!r}")
    return [int(f) for f in fields[:8]]  # guest time, which follows, is part of user time


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of what is installed; a machine that only computes has no gRPC, for one."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str:
    """Short hash, with "+changes" when tracked files differ from it; "" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+changes" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
