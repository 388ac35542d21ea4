"""A dry run of the published recipe: sizes worked out by hand, real programs traced."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.training import child
from training import contrastive, dry_run, flops
from training.contrastive import PRESETS
from tte_jax.errors import InvalidInputError
from tte_jax.models.shapes import shape_config


@pytest.fixture(scope="module")
def seven() -> dry_run.Estimate:
    return dry_run.estimate(replace(PRESETS["paper-7b"], model="7B", mesh="data=4,fsdp=8,tp=4"))


def test_bytes_of_the_7b_recipe(seven: dry_run.Estimate) -> None:
    """128 devices: weights over fsdp * tp = 32, the batch over data * fsdp = 32."""
    assert (seven.parameters, seven.trained) == (8_291_375_616, 40_370_176)
    share = 2 * 8_291_375_616 / 32
    assert share <= seven.bytes["weights"] < 1.02 * share  # norms and biases are whole
    # a of q, k, v, gate and up over fsdp, of o and down over tp; b the other way round.
    d, f, kv, r, layers = 3584, 18_944, 512, 16, 28
    inputs = (d * 5) / 8 + (d + f) / 4
    outputs = (d + 2 * kv + 2 * f) / 4 + 2 * d / 8
    adapters = 4 * layers * r * (inputs + outputs)
    assert seven.bytes["trained"] == adapters
    # Two moments and two counters; also of the temperature.
    assert seven.bytes["optimiser"] == pytest.approx(2 * adapters, rel=1e-5)
    assert seven.bytes["vectors and their gradients"] == 2 * 8192 * 9 // 32 * d * 4
    assert seven.shardings["text.layers.q_dnh/a"].endswith("(None, 'fsdp', None)")
    assert seven.shardings["text.layers.down_fd/b"].endswith("(None, None, 'fsdp')")


def test_flops_of_the_7b_recipe(seven: dry_run.Estimate) -> None:
    """Every sequence as long as the longest row: by hand, text and vision."""
    d, f, kv, length = 3584, 18_944, 512, 2048
    matrices = 28 * (2 * d * d + 2 * d * kv + 3 * d * f)
    text = 2 * length * matrices + 2 * 28 * 3584 * length**2
    block = 4 * 1280**2 + 2 * 4 * 1280**2
    tower = 2 * 1024 * (1176 * 1280 + 32 * block + (5120**2 + 5120 * d) / 4)
    tower += 4 * 32 * 1280 * 1024**2
    sequences = 8192 * 9
    assert seven.flops == pytest.approx(sequences * (2 * text + tower) / 128, rel=1e-9)
    assert seven.hardware_flops > 1.5 * seven.flops


def test_costs_by_training_method() -> None:
    made = flops.costs(shape_config("2B"))
    given = {"tokens": 100.0, "squares": 10_000.0}
    full, lora = (made.training(**given, full=full) for full in (True, False))
    assert full == 1.5 * lora
    predicted = made.training(**given, predicted=10, full=True) - full
    assert predicted == 3 * 10 * 2 * 151_936 * 1536


def test_a_mesh_that_does_not_fit() -> None:
    settings = replace(PRESETS["paper-7b"], model="7B", mesh="data=1,tp=3")
    with pytest.raises(InvalidInputError, match="does not divide"):
        dry_run.estimate(settings)
    with pytest.raises(InvalidInputError, match="global_batch 8192"):
        dry_run.estimate(replace(settings, mesh="data=3"))


def test_the_command_needs_no_device_and_no_data() -> None:
    command = ["--config", "paper-2b", "--model", "2B", "--mesh", "fsdp=4,tp=2", "--dry-run"]
    said = subprocess.run(
        [sys.executable, "-m", "training.contrastive", *command],
        cwd=child.ROOT, check=True, capture_output=True, text=True, timeout=child.TIMEOUT_S,
    ).stdout  # fmt: skip
    assert "2,208,985,600 parameters" in said and "TFLOP per device" in said
    assert "float32[28, 1536, 16] @ (None, 'fsdp', None)" in said
    assert contrastive.PRESETS["paper-2b"].dry_run is False
