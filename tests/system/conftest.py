"""One system for the whole folder, with a small corpus in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system import running
from tests.system.running import System
from tte_jax.cascade import IngestOptions
from tte_jax.client import Client

DOCUMENTS = 30


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running.system(tmp_path_factory.mktemp("system")) as started:
        options = IngestOptions(reasoning_tokens=running.BUDGET.reasoning_tokens)
        with started.client() as client:
            updates = list(client.ingest(running.documents(DOCUMENTS), options, timeout_s=200.0))
        failed = [result for update in updates for result in update.results if result.error]
        assert not failed and updates[-1].stored == DOCUMENTS, failed
        yield started


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with system.client() as connected:
        yield connected
