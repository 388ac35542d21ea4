"""What a child process runs on several devices: `python -m tests.sharding.runs ORDER.json`.

XLA reads the number of host devices once, so meshes need processes of their own. The child loads
the checkpoint on each mesh it is given and writes the outputs; the test compares them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280
POLL_S = 0.1


def start(
    order: dict[str, Any], folder: Path, *, devices: int, module: str = "tests.sharding.runs"
) -> subprocess.Popen[bytes]:
    """Starts a child with `devices` host devices on an order; see the module's `main`."""
    path = folder / f"order_{order.get('process', 0)}.json"
    path.write_text(json.dumps(order))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", module, str(path)]
    # To a file: a pipe that nobody reads would stop a child that says much.
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def finish(*children: subprocess.Popen[bytes], timeout_s: float = TIMEOUT_S) -> None:
    """Waits for the children. One that fails or takes too long ends all; their output is shown."""
    until = time.monotonic() + timeout_s
    try:
        while (codes := [child.poll() for child in children]) and None in codes:
            # The others of a job would wait for one that has failed.
            if any(codes) or time.monotonic() > until:
                break
            time.sleep(POLL_S)
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = [Path(str(child.args[-1])).with_suffix(".log").read_text() for child in children]
    assert not any(codes) and None not in codes, (codes, *(text[-4000:] for text in said))


class CountedFile:
    """`safetensors.safe_open` that counts the bytes that come out of it."""

    read = 0

    def __init__(self, path: Path, framework: str) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, key: str) -> CountedSlice:
        return CountedSlice(self._file.get_slice(key))


class CountedSlice:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.get_shape = tensor.get_shape

    def __getitem__(self, index: Any) -> np.ndarray:
        value = self._tensor[index]
        CountedFile.read += value.nbytes
        return value


def join(order: dict[str, Any]) -> None:
    """Makes this process part of a job on this machine, which nothing outside can reach."""
    import jax
    from jax._src.lib import _jax

    # Gloo listens where the host's name leads; JAX has no option for it.
    _jax.make_gloo_tcp_collectives = partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
    address = f"127.0.0.1:{order['port']}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, order["processes"], order["process"], coordinator_bind_address=address
    )


def main(order: dict[str, Any]) -> None:
    """Order: {"model", "batch" (npz), "meshes", "out" (folder)} and, for a job of several
    processes, {"process", "processes", "port"}; "quantise" as `load_model` takes it.

    Writes for mesh 0, 1, … and this process `{mesh}_{process}.npz` (logits, hidden and, where the
    order says how many "new_tokens", the prompts with their greedy continuation) and `.json`:
    "parameters" (path → sharding and bytes), "read" (bytes that came out of files) and "held"
    (bytes of the different parts of parameters on this process's devices).
    """
    if "port" in order:
        join(order)
    import jax

    import tte_jax
    from tte_jax import sharding
    from tte_jax.weights import files

    files.safe_open = CountedFile
    batch = dict(np.load(order["batch"]))
    for number, sizes in enumerate(order["meshes"]):
        mesh = sharding.make_mesh(**sizes)
        CountedFile.read = 0
        model = tte_jax.load_model(order["model"], mesh=mesh, quantise=order.get("quantise"))
        read = CountedFile.read
        leaves = jax.tree_util.tree_leaves_with_path(model.module)
        parts = [{str(s.index): s.data.nbytes for s in w.addressable_shards} for _, w in leaves]
        about = {
            "parameters": {
                jax.tree_util.keystr(path): [str(w.sharding.spec), w.nbytes] for path, w in leaves
            },
            "read": read,
            "held": sum(sum(part.values()) for part in parts),
        }
        out = model(**batch)
        where = Path(order["out"]) / f"{number}_{order.get('process', 0)}"
        arrays = {"logits": out.logits, "hidden": out.last_hidden_state}
        if new := order.get("new_tokens"):
            arrays["tokens"] = model.generate(**batch, max_new_tokens=new)
        np.savez(where.with_suffix(".npz"), **arrays)
        where.with_suffix(".json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
