"""`tte convert`: Hugging Face → Orbax → Hugging Face gives the same arrays, and transformers reads
what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, qwen3, text_batch
from tests.models.test_loading import assert_same_weights
from tte_jax.cli.app import app
from tte_jax.errors import DataLossError, PreconditionError
from tte_jax.weights import checkpoint, hf
from tte_jax.weights import convert as converting


def tte(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for p in directory.glob("*.safetensors") for k, t in load_file(p).items()}


def assert_same_files(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_there_and_back(saved: Callable[..., Checkpoint], tmp_path: Path, family: str) -> None:
    source = saved(family, tied=family != "qwen3")
    made = tte(source.path, tmp_path / "orbax", "--json")
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert (said["format"], said["dtype"], said["files"]) == ("orbax", "float32", [])
    assert not list((tmp_path / "orbax").glob("*.safetensors"))
    assert_same_weights(tte_jax.load_model(tmp_path / "orbax"), tte_jax.load_model(source.path))
    back = tte(tmp_path / "orbax", tmp_path / "hf", "--shard-size", "100KB", "--json")
    assert back.exit_code == 0, back.output
    said = json.loads(back.stdout)
    assert said["format"] == "hf" and len(said["files"]) > 2
    assert said["parameters"] == sum(t.numel() for t in tensors(source.path).values())
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(said["files"])
    assert index["metadata"]["total_size"] == said["bytes"]
    largest = max(t.nbytes for t in tensors(source.path).values())
    for name in said["files"]:
        held = sum(t.nbytes for t in load_file(tmp_path / "hf" / name).values())
        assert held <= max(100_000, largest)
    assert_same_files(tmp_path / "hf", source.path)
    kind = type(source.model)
    again, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = text_batch("right") if family == "qwen3" else images_batch("right")
    real = batch["attention_mask"] > 0
    expected, _ = source.answers(batch)
    answers, _ = Checkpoint(tmp_path / "hf", again.eval()).answers(batch)
    np.testing.assert_allclose(answers[real], expected[real], rtol=0, atol=1e-4)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing is left over"


def test_half_precision_stays_and_can_be_asked_for(tmp_path: Path) -> None:
    qwen3(tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    assert tte(tmp_path / "a", tmp_path / "b").exit_code == 0
    assert checkpoint.stored_dtype(tmp_path / "b") == "bfloat16"
    assert tte(tmp_path / "b", tmp_path / "c").exit_code == 0
    assert_same_files(tmp_path / "c", tmp_path / "a")
    assert tte(tmp_path / "b", tmp_path / "d", "--dtype", "float32").exit_code == 0
    assert {t.dtype for t in tensors(tmp_path / "d").values()} == {torch.float32}
    # Readers go by the configuration: it must not say bfloat16 any more.
    assert json.loads((tmp_path / "d" / "config.json").read_text())["dtype"] == "float32"


def test_an_existing_directory_is_replaced_only_when_told(
    saved: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    source, out = saved("qwen3", tied=True).path, tmp_path / "out"
    assert tte(source, out, "--to", "hf").exit_code == 0
    (out / "mine.txt").write_text("kept until it is replaced")
    refused = tte(source, out)
    assert refused.exit_code == 2 and "--force" in refused.output
    assert (out / "mine.txt").exists()
    assert tte(source, out, "--force").exit_code == 0
    assert checkpoint.is_checkpoint(out) and not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    refused = tte(source, precious, "--force")
    assert refused.exit_code == 2 and (precious / "thesis.tex").exists()
    assert tte(out, out, "--force").exit_code == 2
    assert tte(out, tmp_path, "--force").exit_code == 2 and checkpoint.is_checkpoint(out)


def test_a_failure_leaves_nothing_behind(
    saved: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    source, out = saved("qwen3", tied=True).path, tmp_path / "out"
    assert tte(source, out, "--to", "hf").exit_code == 0
    before = sorted(p.name for p in out.iterdir())
    monkeypatch.setattr(converting.hf, "export", full)
    failed = tte(source, out, "--to", "hf", "--force")
    assert failed.exit_code == 1 and "No space left" in failed.output
    assert sorted(p.name for p in out.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--to", "onnx"], 2, "hf, orbax"),
        (["--dtype", "int3"], 2, "bfloat16"),
        (["--shard-size", "many"], 2, "5GB"),
        (["--shard-size", "0"], 2, "shard-size"),
        (["--adapter", "/nowhere/adapter"], 3, "adapter_config.json"),
    ],
)
def test_wrong_usage(
    saved: Callable[..., Checkpoint], tmp_path: Path, arguments: list[str], code: int, word: str
) -> None:
    failed = tte(saved("qwen3", tied=True).path, tmp_path / "out", *arguments)
    assert failed.exit_code == code and word in failed.output
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    failed = tte(tmp_path / "nowhere", tmp_path / "out")
    assert failed.exit_code == 3 and "nowhere" in failed.output


def test_a_checkpoint_of_another_shape_names_every_fault(
    saved: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    assert tte(saved("qwen3", tied=True).path, tmp_path / "m").exit_code == 0
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    changed = {"intermediate_size": 80, "tie_word_embeddings": False}
    file.write_text(json.dumps(config | changed))
    with pytest.raises(PreconditionError) as caught:
        tte_jax.load_model(tmp_path / "m")
    for fault in (
        "missing: text.head_dv [64, 160]",
        "shape: text.layers.down_fd is [3, 96, 64], expected [3, 80, 64]",
        "4 problems",
    ):
        assert fault in str(caught.value)
    (tmp_path / "m" / checkpoint.MARKER).write_text('{"format": 99, "dtype": "float32"}')
    with pytest.raises(PreconditionError, match="99"):
        tte_jax.load_model(tmp_path / "m")
    (tmp_path / "m" / checkpoint.MARKER).write_text("{}")
    with pytest.raises(DataLossError, match="damaged"):
        tte_jax.load_model(tmp_path / "m")


def test_a_checkpoint_without_its_arrays(saved: Callable[..., Checkpoint], tmp_path: Path) -> None:
    assert tte(saved("qwen3", tied=True).path, tmp_path / "m").exit_code == 0
    shutil.rmtree(tmp_path / "m" / checkpoint.PARAMS)
    with pytest.raises(DataLossError, match="cannot be read"):
        tte_jax.load_model(tmp_path / "m")


def test_a_checkpoint_is_read_to_the_sharding(
    saved: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    source = saved("qwen3", tied=True).path
    assert tte(source, tmp_path / "m").exit_code == 0
    mesh = jax.make_mesh((1,), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    model = checkpoint.load(tmp_path / "m", sharding_of=lambda path, shape: place)
    assert model.text.layers.q_dnh.get_value().sharding == place
    assert_same_weights(tte_jax.Model(model), tte_jax.load_model(source))


def test_an_export_removes_the_files_of_the_one_before(
    saved: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Or readers would take the old ones: transformers prefers the single file, we the index."""
    model = tte_jax.load_model(saved("qwen3", tied=True).path).module
    hf.export(model, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.iterdir())) > 3
    hf.export(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [hf.WEIGHTS]
    hf.export(model, tmp_path, shard_bytes=100_000)
    assert (tmp_path / hf.INDEX).exists() and not (tmp_path / hf.WEIGHTS).exists()
