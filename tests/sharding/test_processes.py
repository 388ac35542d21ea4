"""One model over two processes, as on a pod: the same answers, and each reads only its part."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tte_jax
from tests.models.conftest import Checkpoint, images_batch
from tests.sharding import runs

# Four devices each: those of process 0 come first in the mesh.
SPLIT, COPIED = 0, 1
MESHES = [
    {"data": 1, "fsdp": 4, "tp": 2},  # each process holds half of every matrix
    {"data": 2, "fsdp": 2, "tp": 2},  # each holds a copy of the model
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def job(
    saved: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray], tte_jax.ModelOutput, Path]:
    """(checkpoint, batch, outputs on one device, folder with those of both processes)."""
    folder = tmp_path_factory.mktemp("job")
    path = saved("qwen2_vl", tied=False).path
    batch = images_batch("left")
    np.savez(folder / "batch.npz", **batch)
    order: dict[str, Any] = {
        "model": str(path), "batch": str(folder / "batch.npz"), "out": str(folder),
        "meshes": MESHES, "port": free_port(), "processes": 2,
    }  # fmt: skip
    children = [runs.start(order | {"process": p}, folder, devices=4) for p in range(2)]
    try:
        alone = tte_jax.load_model(path)(**batch)
    finally:
        runs.finish(*children)
    return path, batch, alone, folder


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("mesh", range(len(MESHES)))
def test_both_processes_say_what_one_device_says(job, mesh: int, process: int) -> None:
    _, batch, alone, folder = job
    real = batch["attention_mask"] > 0
    assert alone.logits[real].std() > 0.5
    there = np.load(folder / f"{mesh}_{process}.npz")
    for name, ours in (("logits", alone.logits), ("hidden", alone.last_hidden_state)):
        np.testing.assert_allclose(there[name][real], ours[real], rtol=0, atol=1e-5)


def reports(folder: Path, mesh: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{mesh}_{p}.json").read_text()) for p in range(2)]


def test_each_process_reads_its_half_of_what_is_split(job) -> None:
    path, _, _, folder = job
    stored = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    both = reports(folder, SPLIT)
    for one in both:
        assert one["read"] == one["held"]
        assert one["read"] < 0.6 * stored
    parameters = both[0]["parameters"].values()
    total = sum(size for _, size in parameters)
    shared = sum(size for spec, size in parameters if "fsdp" not in spec)
    assert sum(one["read"] for one in both) == total + shared


def test_a_part_that_several_devices_hold_is_read_once(job) -> None:
    _, _, _, folder = job
    for one in reports(folder, COPIED):
        assert one["read"] == sum(size for _, size in one["parameters"].values())
