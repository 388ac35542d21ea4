"""Reading and writing model directories: shards, dtypes, and every way the files can be wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, qwen2_vl, qwen3, text_batch
from tte_jax.errors import DataLossError, NotFoundError, PreconditionError
from tte_jax.weights import hf


def leaves(model: tte_jax.Model) -> list[tuple[str, np.ndarray]]:
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model.module)))
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in flat]


def assert_same_weights(a: tte_jax.Model, b: tte_jax.Model) -> None:
    ours, theirs = leaves(a), leaves(b)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, x), (_, y) in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture
def copy(saved: Callable[..., Checkpoint], tmp_path: Path) -> Callable[[str, bool], Path]:
    def make(family: str, tied: bool) -> Path:
        return Path(shutil.copytree(saved(family, tied=tied).path, tmp_path / "model"))

    return make


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_shards_hold_the_same_weights(
    saved: Callable[..., Checkpoint], tmp_path: Path, family: str
) -> None:
    checkpoint = saved(family, tied=False)
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_weights(tte_jax.load_model(tmp_path), tte_jax.load_model(checkpoint.path))
    (tmp_path / "model.safetensors.index.json").unlink()  # shards alone do, too
    assert_same_weights(tte_jax.load_model(tmp_path), tte_jax.load_model(checkpoint.path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    qwen2_vl(tied=True, seed=3).to(dtype).save_pretrained(tmp_path, max_shard_size="60KB")
    # Read again: `.to(dtype)` has rounded the rotary frequencies, too.
    rounded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    reference = Checkpoint(tmp_path, rounded.eval())
    batch = images_batch("right")
    logits, _ = reference.answers(batch)
    real = batch["attention_mask"] > 0
    ours = tte_jax.load_model(tmp_path)(**batch).logits
    np.testing.assert_allclose(ours[real], logits[real], rtol=0, atol=1e-4)


def test_bfloat16_in_memory(saved: Callable[..., Checkpoint]) -> None:
    checkpoint = saved("qwen2_vl", tied=True)
    model = tte_jax.load_model(checkpoint.path, dtype="bfloat16")
    assert {str(leaf.dtype) for _, leaf in leaves(model)} == {"bfloat16"}
    batch = images_batch("right")
    out = model(**batch)
    real = batch["attention_mask"] > 0
    assert out.logits.dtype == np.float32
    _, hidden = checkpoint.answers(batch)
    a, b = out.last_hidden_state[real].astype(np.float32), hidden[real]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.98


def old_name(name: str) -> str:
    return re.sub(r"^model\.(visual\.)|^(model\.)language_model\.", r"\1\2", name)


def new_name(name: str) -> str:
    name = old_name(name)
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!visual)", "model.language_model.", name)


@pytest.mark.parametrize(
    ("rename", "parts"),
    [
        (old_name, {"visual.blocks", "visual.merger", "model.layers", "model.norm"}),
        (new_name, {"model.visual", "model.language_model"}),
    ],
)
def test_names_of_transformers_4_and_5(
    copy: Callable[[str, bool], Path], rename: Callable[[str], str], parts: set[str]
) -> None:
    path = copy("qwen2_vl", False)
    before = tte_jax.load_model(path)
    tensors = {rename(n): t for n, t in load_file(path / "model.safetensors").items()}
    assert parts <= {".".join(name.split(".")[:2]) for name in tensors}
    save_file(tensors, path / "model.safetensors")
    assert_same_weights(tte_jax.load_model(path), before)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_config_of_transformers_4(copy: Callable[[str, bool], Path], family: str) -> None:
    """Flat, with the keys and tensor names that the released checkpoints have."""
    path = copy(family, True)
    before = tte_jax.load_model(path)
    raw = json.loads((path / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types", "dtype"):
        text.pop(key, None)
    flat = {**text, **raw, "torch_dtype": "float32", "transformers_version": "4.41.2"}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 3}
    vision = flat["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    for key in ("model_type", "initializer_range", "dtype"):
        vision.pop(key, None)
    (path / "config.json").write_text(json.dumps(flat))
    tensors = {old_name(n): t for n, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    after = tte_jax.load_model(path)
    assert after.config == before.config
    assert_same_weights(after, before)
    # The reference reads such a file to the same answers, so it is one of its kind.
    kinds = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    }
    batch = images_batch("right")
    real = batch["attention_mask"] > 0
    reference = kinds[family].from_pretrained(path, dtype=torch.float32).eval()
    logits, _ = Checkpoint(path, reference).answers(batch)
    np.testing.assert_allclose(after(**batch).logits[real], logits[real], rtol=0, atol=1e-4)


def test_every_fault_is_reported_at_once(copy: Callable[[str, bool], Path]) -> None:
    path = copy("qwen3", False)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 3)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(PreconditionError) as caught:
        tte_jax.load_model(path)
    message = str(caught.value)
    for fault in (
        "missing: model.layers.1.mlp.up_proj.weight [96, 64]",
        "missing: model.norm.weight [64]",
        "unexpected: model.layers.7.mlp.up_proj.weight [2, 3]",
        "unexpected: model.layers.0.self_attn.q_proj.bias [128]",
        "shape: lm_head.weight is [159, 64], expected [160, 64]",
    ):
        assert fault in message
    assert "5 problems" in message


def test_missing_vision_tensor(copy: Callable[[str, bool], Path]) -> None:
    path = copy("qwen2_vl", True)
    tensors = load_file(path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("visual.merger.mlp.2.bias"))
    del tensors[name]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(PreconditionError, match=r"missing: visual\.merger\.mlp\.2\.bias \[64\]"):
        tte_jax.load_model(path)


def test_harmless_extras_are_taken(copy: Callable[[str, bool], Path]) -> None:
    path = copy("qwen3", True)
    before = tte_jax.load_model(path)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, path / "model.safetensors")
    assert_same_weights(tte_jax.load_model(path), before)


def test_absent_and_damaged_files(copy: Callable[[str, bool], Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        tte_jax.load_model(tmp_path / "nowhere")
    path = copy("qwen3", True)
    whole = (path / "model.safetensors").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\0" * 64):
        (path / "model.safetensors").write_bytes(broken)
        with pytest.raises(DataLossError, match=r"model\.safetensors|damaged"):
            tte_jax.load_model(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="safetensors"):
        tte_jax.load_model(path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotFoundError, match="model-00001-of-00002"):
        tte_jax.load_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(PreconditionError, match="JSON"):
        tte_jax.load_model(path)
    (path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PreconditionError, match=r"'bert'.*qwen2_vl, qwen3"):
        tte_jax.load_model(path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_torn_configurations_are_named(
    copy: Callable[[str, bool], Path], file: str, content: str
) -> None:
    path = copy("qwen3", True)
    (path / file).write_text(content)
    with pytest.raises(PreconditionError, match=rf"/{file}'"):
        tte_jax.load_model(path)


@pytest.mark.parametrize("key", ["rms_norm_eps", "num_key_value_heads", "vocab_size"])
def test_missing_config_keys_are_named(copy: Callable[[str, bool], Path], key: str) -> None:
    path = copy("qwen3", True)
    raw = json.loads((path / "config.json").read_text())
    del raw[key]
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PreconditionError, match=key):
        tte_jax.load_model(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    copy: Callable[[str, bool], Path], change: dict[str, object], word: str
) -> None:
    path = copy("qwen3", True)
    raw = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PreconditionError, match=word):
        tte_jax.load_model(path)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl"])
@pytest.mark.parametrize("tied", [True, False])
def test_export_is_read_by_the_reference(
    saved: Callable[..., Checkpoint], tmp_path: Path, family: str, tied: bool
) -> None:
    checkpoint = saved(family, tied=tied)
    model = tte_jax.load_model(checkpoint.path)
    hf.export(model.module, tmp_path)
    shutil.copy(checkpoint.path / "config.json", tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    kind = type(checkpoint.model)
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = dict(checkpoint.model.named_parameters())
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    assert_same_weights(tte_jax.load_model(tmp_path), model)


def test_sharded_loading_is_plain_loading(saved: Callable[..., Checkpoint]) -> None:
    """Through `make_array_from_callback`, the path that a mesh takes, with slices of layers."""
    checkpoint = saved("qwen2_vl", tied=False)
    mesh = jax.make_mesh((1,), ("fsdp",))

    def sharding_of(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    sharded = tte_jax.Model(hf.load(checkpoint.path, sharding_of=sharding_of))
    assert_same_weights(sharded, tte_jax.load_model(checkpoint.path))


def test_answers_after_export_of_a_changed_model(tmp_path: Path) -> None:
    """The table turns weights around both ways: a transposition in both would cancel out above."""
    source = qwen3(tied=False, seed=9)
    source.save_pretrained(tmp_path / "a")
    model = tte_jax.load_model(tmp_path / "a")
    rng = np.random.default_rng(0)
    pure = nnx.to_pure_dict(nnx.state(model.module))
    changed = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype("f"), pure)
    nnx.update(model.module, nnx.State(changed))
    hf.export(model.module, tmp_path / "b")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    batch = text_batch("right")
    logits, _ = Checkpoint(tmp_path / "b", reference).answers(batch)
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(model(**batch).logits[real], logits[real], rtol=0, atol=1e-4)
