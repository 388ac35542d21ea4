"""What a child process runs on several devices: `python -m tests.sharding.runs ORDER.json`.

XLA reads the number of host devices once, so meshes need processes of their own. The child loads
the checkpoint on each mesh it is given and writes the outputs; the test compares them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280


def start(order: dict[str, Any], folder: Path, *, devices: int) -> subprocess.Popen[str]:
    """Starts a child with `devices` host devices on an order; see `main` for its fields."""
    path = folder / f"order_{order.get('process', 0)}.json"
    path.write_text(json.dumps(order))
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.sharding.runs", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*children: subprocess.Popen[str]) -> None:
    """Waits for the children; fails with the output of one that failed."""
    try:
        outputs = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, said in zip(children, outputs, strict=True):
        assert child.returncode == 0, said[-4000:]


def main(order: dict[str, Any]) -> None:
    """Order: {"model", "batch" (npz), "meshes", "out" (folder)} and, for a job of several
    processes, {"process", "processes", "port"}."""
    import jax

    if "port" in order:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{order['port']}", order["processes"], order["process"]
        )
    import tte_jax
    from tte_jax import sharding

    batch = dict(np.load(order["batch"]))
    for number, sizes in enumerate(order["meshes"]):
        mesh = sharding.make_mesh(**sizes)
        model = tte_jax.load_model(order["model"], mesh=mesh)
        out = model(**batch)
        specs = {
            jax.tree_util.keystr(path): str(leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(model.module)
        }
        where = Path(order["out"]) / f"{number}_{order.get('process', 0)}"
        np.savez(where.with_suffix(".npz"), logits=out.logits, hidden=out.last_hidden_state)
        where.with_suffix(".json").write_text(json.dumps({"specs": specs}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
