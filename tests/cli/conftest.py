"""The command line against a running system."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.cli.system import System
from tte_jax import system_state
from tte_jax.builtin import openmoji
from tte_jax.cli.app import app

Tte = Callable[..., Result]


@pytest.fixture(scope="package")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("system"))
    yield running
    running.stop()


@pytest.fixture
def tte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tte:
    """Runs a command in a process-like way; `TTE_DATA_DIR` is empty unless a test fills it."""
    monkeypatch.setenv("TTE_DATA_DIR", str(tmp_path / "data"))
    return lambda *arguments, **env: CliRunner().invoke(
        app, [str(a) for a in arguments], env={k: str(v) for k, v in env.items()}
    )


@pytest.fixture
def running(system: System, tte: Tte) -> Iterator[Tte]:
    """Commands that find `system` by its state file, as on a user's machine."""
    folder = Path(os.environ["TTE_DATA_DIR"])
    services = tuple(
        system_state.ServiceState(name, "serving", address)
        for name, address in system.addresses.items()
    )
    with system_state.lock(folder):
        system_state.write(folder, system_state.SystemState(os.getpid(), True, services))
        yield tte


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first five pictures stand for the corpus."""
    some = openmoji.entries()[:5]
    monkeypatch.setattr(openmoji, "entries", lambda *, extras=False: some)
    yield len(some)


def document(result: Result) -> Any:
    """The one JSON document on stdout; fails when there is anything else."""
    return json.loads(result.stdout)
