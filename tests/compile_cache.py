"""Where the tests keep compiled programs between runs: most of a first run's time is XLA."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def directory() -> Path:
    """The cache that JAX's own variable names, else the checkout's; made for its owner alone."""
    default = Path(__file__).resolve().parents[1] / ".tte" / "test-compile-cache"
    path = Path(os.environ.get(_VARIABLE) or default).absolute()
    # Before JAX makes it with the usual rights: a cache that others can write is refused.
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def enable() -> None:
    """For JAX in this process and those it starts. Call before JAX is imported."""
    os.environ[_VARIABLE] = str(directory())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
