"""The same model on one device and on eight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, text_batch
from tests.sharding import runs
from tte_jax import sharding

MESHES = [
    {"data": 1, "fsdp": 4, "tp": 2},
    {"data": 2, "fsdp": 1, "tp": 4},  # wider than the two key/value heads
    {"data": 8, "fsdp": 1, "tp": 1},  # wider than the batch of four
]
NEW = 6


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def outcome(
    request: pytest.FixtureRequest,
    saved: Callable[..., Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, np.ndarray], tte_jax.ModelOutput, Path, np.ndarray | None]:
    """(batch, outputs on one device, folder with those of each mesh, tokens on one device)."""
    family = request.param
    folder = tmp_path_factory.mktemp("meshes")
    path = saved(family, tied=family == "qwen3").path
    batch = text_batch("left") if family == "qwen3" else images_batch("left")
    np.savez(folder / "batch.npz", **batch)
    order: dict[str, Any] = {"model": str(path), "batch": str(folder / "batch.npz")}
    # Generation compiles two programs more a mesh; two families hold all kinds of layers for it.
    new = NEW if family in ("qwen2_vl", "qwen3") else 0
    order |= {"meshes": MESHES, "out": str(folder), "new_tokens": new}
    child = runs.start(order, folder, devices=8)
    model = tte_jax.load_model(path)
    alone = model(**batch)
    tokens = model.generate(**batch, max_new_tokens=NEW) if new else None
    runs.finish(child)
    return batch, alone, folder, tokens


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_eight_devices_say_what_one_says(outcome, number: int) -> None:
    batch, alone, folder, _ = outcome
    real = batch["attention_mask"] > 0
    assert alone.logits[real].std() > 0.5
    there = np.load(folder / f"{number}_0.npz")
    for name, ours in (("logits", alone.logits), ("hidden", alone.last_hidden_state)):
        # 1e-5 holds with AVX2; the matrix kernels for AVX-512 sum otherwise, by up to 1.22e-5.
        np.testing.assert_allclose(there[name][real], ours[real], rtol=0, atol=1.5e-5)


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_eight_devices_continue_as_one_does(outcome, number: int) -> None:
    batch, _, folder, tokens = outcome
    if tokens is None:
        pytest.skip("not generated with this family")
    there = np.load(folder / f"{number}_0.npz")["tokens"]
    np.testing.assert_array_equal(there, tokens)
    width = batch["input_ids"].shape[1]
    assert there.shape[1] == width + NEW and len(np.unique(there[:, width:])) > 8


def test_a_mesh_that_does_not_split_the_batch(saved: Callable[..., Checkpoint]) -> None:
    """As with tp alone. One device will do: the types name all axes, whatever their size."""
    path, batch = saved("qwen2_vl", tied=False).path, images_batch("left")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    there = tte_jax.load_model(path, mesh=mesh)(**batch)
    here = tte_jax.load_model(path)(**batch)
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(there.logits[real], here.logits[real], rtol=0, atol=1e-5)


def test_int8_on_eight_devices(saved: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path, batch = saved("qwen2_vl", tied=False).path, images_batch("left")
    np.savez(tmp_path / "batch.npz", **batch)
    order: dict[str, Any] = {"model": str(path), "batch": str(tmp_path / "batch.npz")}
    order |= {"meshes": MESHES[:1], "out": str(tmp_path), "quantise": "int8"}
    child = runs.start(order, tmp_path, devices=8)
    alone = tte_jax.load_model(path, quantise="int8")(**batch)
    runs.finish(child)
    there = np.load(tmp_path / "0_0.npz")["logits"]
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(there[real], alone.logits[real], rtol=0, atol=1e-5)
    parameters = json.loads((tmp_path / "0_0.json").read_text())["parameters"]
    specs = {path: spec for path, (spec, _) in parameters.items() if ".down_fd" in path}
    assert sorted(specs.values()) == ["P(None, 'tp', 'fsdp')", "P(None, None, None)"]


def test_parameters_really_are_split(outcome) -> None:
    folder = outcome[2]

    def of(number: int, name: str) -> str:
        parameters = json.loads((folder / f"{number}_0.json").read_text())["parameters"]
        (spec,) = {spec for path, (spec, _) in parameters.items() if f".{name}" in path}
        return spec

    assert of(0, "q_dnh") == "P(None, 'fsdp', 'tp', None)"
    assert of(0, "down_fd") == "P(None, 'tp', 'fsdp')"
    assert of(1, "q_dnh") == "P(None, 'fsdp', 'tp', None)"
    assert of(1, "k_dkh") == "P(None, 'fsdp', None, None)"
