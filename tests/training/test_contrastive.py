"""Whole runs of the contrastive trainer: stopped, killed, on other meshes, in two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny_models
from tests.sharding import runs
from tests.sharding.test_processes import free_port
from tests.training import child, pairs_file
from training import contrastive
from training.optimiser import Optimiser
from tte_jax.embedder import Embedder
from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.model import load_model
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs

CHILD_S = 280


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and texts; images are in `test_gradcache` and in the run on eight devices."""
    root = tmp_path_factory.mktemp("contrastive")
    pairs_file.write(root)
    tiny_models.write_model(root / "model", family="qwen3", roles=["embedder"], seed=5)
    return root


def config(folder: Path, out: str) -> contrastive.Config:
    made = pairs_file.config(folder / "model", folder / "pairs.jsonl", folder / out)
    return replace(made, no_ecr=0.3)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    settings = config(folder, "whole")
    settings = replace(settings, eval=settings.data[0], eval_examples=6)
    assert contrastive.main(settings) == settings.out / "export"
    return settings.out


def test_the_temperature_has_a_bound(folder: Path, uninterrupted: Path) -> None:
    settings = replace(config(folder, "cold"), steps=2)
    for temperature in (0.005, 0.0, 2.0):
        with pytest.raises(InvalidInputError, match="expected 0.01 to 1"):
            contrastive.main(replace(settings, temperature=temperature))
    learnt = replace(settings, temperature=0.0101, optimiser=Optimiser(lr=0.5))
    contrastive.main(learnt)
    assert all(row["temperature"] >= 0.00999 for row in rows(learnt.out))


def same_run(a: Path, b: Path) -> None:
    """Parameters bit for bit, and what was reported of every step."""
    ours, theirs = adapter(a), adapter(b)
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    for one, other in zip(rows(a), rows(b), strict=True):
        for name in ("step", "loss", "grad_norm", "temperature", "masked"):
            assert one[name] == other[name]


def test_it_learns_and_says_so(uninterrupted: Path, folder: Path) -> None:
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[-1]["loss"] < found[0]["loss"]
    assert {
        "loss", "grad_norm", "temperature", "hit", "hardness", "masked", "negative", "positive",
        "examples_per_second", "seconds_per_step", "pad_share", "tflops",
    } <= found[0].keys()  # fmt: skip
    assert 0 < found[0]["pad_share"] < 1 and found[0]["temperature"] == pytest.approx(0.1)
    assert found[-1]["temperature"] != found[0]["temperature"], "it is learnt"
    assert "eval/hit1" in found[1] and "eval/hit1" not in found[0]
    assert list((uninterrupted / "tensorboard").glob("events.*"))
    fresh = hf.load(folder / "model").text.layers.q_dnh[...]
    served = hf.load(uninterrupted / "export").text.layers.q_dnh[...]
    assert float(abs(fresh - served).max()) > 0


def test_the_export_is_served(uninterrupted: Path, folder: Path) -> None:
    served = Embedder.from_pretrained(uninterrupted / "export")
    assert served.served.name == "tiny-qwen3" and "whole" in json.loads(
        (uninterrupted / "export" / "tte.json").read_text()
    )["version"]  # fmt: skip
    ids = np.array([PromptSet.from_dir(folder / "model").tokenizer.encode("an owl")])
    merged = load_model(uninterrupted / "export")(ids).logits
    beside = load_model(folder / "model", adapter=uninterrupted / "adapter")(ids).logits
    np.testing.assert_allclose(merged, beside, rtol=0, atol=1e-5)


def test_a_run_in_two_parts_is_the_same_run(uninterrupted: Path, folder: Path) -> None:
    settings = replace(config(folder, "parts"), eval=config(folder, "").data[0], eval_examples=6)
    assert contrastive.main(replace(settings, until=2)) is None
    assert not (settings.out / "export").exists()
    contrastive.main(settings)
    same_run(settings.out, uninterrupted)


def test_another_order_of_the_data_is_refused(uninterrupted: Path, folder: Path) -> None:
    settings = replace(config(folder, "whole"), seed=1, steps=5)
    with pytest.raises(PreconditionError, match="seed 0 \\(now 1\\)"):
        contrastive.main(settings)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_that_was_ended_goes_on(
    uninterrupted: Path, folder: Path, how: signal.Signals
) -> None:
    settings = config(folder, how.name)
    # Far more steps than it gets: it must be stopped in the middle.
    settings = replace(settings, steps=4, checkpoint_every=1 if how == signal.SIGKILL else 100)
    log = folder / f"{how.name}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.child", __name__, "one_run", str(folder),
             how.name, str(settings.checkpoint_every)],
            cwd=child.ROOT, stdout=said, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(child.ROOT), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    try:
        until = time.monotonic() + CHILD_S
        metrics = settings.out / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.02)
        process.send_signal(how)
        code = process.wait(CHILD_S)
    finally:
        process.kill()
        process.wait()
    if how == signal.SIGTERM:
        assert code == 0, log.read_text()[-3000:]
        saved = [int(p.name) for p in (settings.out / "checkpoints").iterdir() if p.name.isdigit()]
        assert len(saved) == 1 and saved[0] < 4, "saved where it was stopped"
    else:
        assert code == -signal.SIGKILL
    contrastive.main(settings)
    same_run(settings.out, uninterrupted)


def one_run(folder: str, out: str, checkpoint_every: str) -> None:
    """In a child: slow enough between steps that the parent can stop it in the middle."""
    from training import telemetry

    advance = telemetry.Telemetry.advance

    def slowly(self: telemetry.Telemetry, step: int) -> None:
        advance(self, step)
        time.sleep(0.0 if step == 1 else 1.0)

    telemetry.Telemetry.advance = slowly
    settings = config(Path(folder), out)
    contrastive.main(replace(settings, checkpoint_every=int(checkpoint_every)))


def meshless(folder: Path, out: str) -> contrastive.Config:
    """Dropout is of the packed places, which differ where shards are packed apart."""
    made = config(folder, out)
    return replace(made, tuning=replace(made.tuning, dropout=0.0))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    settings = meshless(folder, "alone")
    contrastive.main(replace(settings, until=2))
    shutil.copytree(settings.out, folder / "moved")
    contrastive.main(settings)
    return settings.out


def assert_close(out: Path, alone: Path) -> None:
    ours, theirs = adapter(out), adapter(alone)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=2e-4, err_msg=name)
    for one, other in zip(rows(out), rows(alone), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def on_a_mesh(folder: str) -> None:
    """In a child with eight devices: a whole run, and one that a single device began."""
    for out, mesh in (("meshed", "data=2,fsdp=2,tp=2"), ("moved", "fsdp=4,tp=2")):
        contrastive.main(replace(meshless(Path(folder), out), mesh=mesh))


@pytest.mark.many_devices
def test_eight_devices_train_what_one_trains(alone: Path, folder: Path) -> None:
    child.run(__name__, "on_a_mesh", str(folder), devices=8)
    assert_close(folder / "meshed", alone)
    assert_close(folder / "moved", alone)


def one_of_two(folder: str, process: str, port: str) -> None:
    """In a child: two devices of a job of two processes over gloo."""
    runs.join({"port": int(port), "processes": 2, "process": int(process)})
    contrastive.main(replace(meshless(Path(folder), "job"), mesh="data=2,fsdp=2"))


@pytest.mark.many_devices
def test_two_processes_train_what_one_trains(alone: Path, folder: Path) -> None:
    """Negatives are global: with its own share alone, a process would have another loss."""
    port = str(free_port())
    both = [
        child.start(__name__, "one_of_two", str(folder), str(p), port, devices=2) for p in range(2)
    ]
    try:
        said = [one.communicate(timeout=CHILD_S)[0] for one in both]
    finally:
        for one in both:
            one.kill()
            one.wait()
    assert [one.returncode for one in both] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert_close(folder / "job", alone)
