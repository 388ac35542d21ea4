"""Runs a test's function in a process of its own: XLA reads the number of host devices once.

python -m tests.training.child MODULE FUNCTION ARGUMENTS…
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280


def start(module: str, function: str, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """A child with `devices` host devices that calls `module.function(*arguments)`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.training.child", module, function, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(module: str, function: str, *arguments: str, devices: int = 1) -> str:
    """Waits for it; its output. Fails when it fails."""
    child = start(module, function, *arguments, devices=devices)
    try:
        said, _ = child.communicate(timeout=TIMEOUT_S)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, said[-4000:]
    return said


if __name__ == "__main__":
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])
