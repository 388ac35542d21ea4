"""How much is proven: in `make test` a little, over tiny models; in `make proofs` the whole, over
the built-in ones.

TTE_PROOF_REQUESTS: random requests to each service; TTE_PROOF_CANCELS: requests of each storm;
TTE_PROOF_MODELS: `tiny` or `builtin`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import service_process
from benchmarks.service_process import ServiceProcess
from tests import compile_cache, tiny_models
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR

REQUESTS = int(os.environ.get("TTE_PROOF_REQUESTS", "60"))
CANCELS = int(os.environ.get("TTE_PROOF_CANCELS", "100"))
BUILTIN = os.environ.get("TTE_PROOF_MODELS", "tiny") == "builtin"
PATIENCE_S = 60.0  # only something broken uses it up


def directory(role: str) -> Path:
    """The model directory of a role."""
    if BUILTIN:
        return WEIGHTS_DIR / (RERANKER if role == "reranker" else REASONER)
    return tiny_models.text_dir() if role == "reranker" else tiny_models.vl_dir()


@contextlib.contextmanager
def service(role: str, data: Path) -> Iterator[ServiceProcess]:
    """A model service as a process that also logs what JAX itself says it compiles."""
    # Long enough for a busy machine: what is cut off by the end of the grace is cancelled.
    flags = [f"--compile-cache={compile_cache.directory()}", "--grace-s=120"]
    with service_process.start(
        role, directory(role), data, flags=flags, environment={"JAX_LOG_COMPILES": "1"}
    ) as started:
        yield started


def compiled_by_jax(running: ServiceProcess) -> int:
    """Programs that XLA finished, from JAX's own log, and those that needed no compilation."""
    said = running.log.read_text(errors="replace")
    return said.count("Finished XLA compilation") + said.count("Read a stored program")


async def until(condition: Callable[[], object], what: str) -> None:
    """Returns when `condition` is true; fails the test when it stays false."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {PATIENCE_S:.0f} s for {what}")
        await asyncio.sleep(0.01)
