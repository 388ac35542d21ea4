"""What holds for every test: compiled programs are kept, and nothing is left running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import compile_cache
from training.launch import without_avx512

compile_cache.enable()
without_avx512(os.environ)  # the trainers' commands do so too


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file's tests run in one process, all of tests/system in the same.

    That group comes first: it is the longest and mostly waits for other processes.
    """
    for item in items:
        folder = item.path.parent
        name = folder.name if folder.name == "system" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.path.parent.name != "system")


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fails the run when a test left a child process behind."""
    before = set(_children())
    yield
    left = {pid: what for pid, what in _children().items() if pid not in before}
    # Python's own helper of multiprocessing; it ends with this process.
    left = {pid: what for pid, what in left.items() if "resource_tracker" not in what}
    assert not left, f"tests left these processes running: {left}"


def _children() -> dict[int, str]:
    """Process id → command line of every living child of this process; zombies have none."""
    found = {}
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, task.read_text().split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if command:
                found[pid] = command.replace(b"\0", b" ").decode(errors="replace")
    return found
