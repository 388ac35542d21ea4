"""Weights as int8: how far a value moves, what is left alone, and what the model says with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, text_batch
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.nn.linear import Int8Weight, columns, project, quantise
from tte_jax.weights import hf
from tte_jax.weights.convert import convert
from tte_jax.weights.table import entries


def parameters(model: tte_jax.Model) -> dict[str, jax.Array | Int8Weight]:
    pure = nnx.to_pure_dict(nnx.state(model.module))
    leaves = jax.tree_util.tree_leaves_with_path(pure, is_leaf=lambda x: isinstance(x, Int8Weight))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def last_states(model: tte_jax.Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, D] L2-normalised states of each row's last real token (padding is on the left)."""
    states = model(**batch).last_hidden_state[:, -1].astype(np.float32)
    return states / np.linalg.norm(states, axis=-1, keepdims=True)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_embeddings_stay_where_they_were(saved: Callable[..., Checkpoint], family: str) -> None:
    path = saved(family, tied=False).path
    batch = text_batch("left") if family == "qwen3" else images_batch("left")
    full = last_states(tte_jax.load_model(path), batch)
    int8 = last_states(tte_jax.load_model(path, quantise="int8"), batch)
    cosines = (full * int8).sum(-1)
    # Towers with weights 8 times the usual amplify any rounding: bfloat16 moves such rows to 0.98.
    texts = slice(None) if family == "qwen3" else slice(2, 3)
    assert cosines[texts].min() > 0.999 and cosines.min() > 0.995
    assert cosines.max() < 1 - 1e-6  # really other weights
    assert (full @ full.T - np.eye(len(full))).max() < 0.99  # else anything would be close


def test_each_value_moves_by_half_a_scale_at_most(saved: Callable[..., Checkpoint]) -> None:
    path = saved("qwen3_vl", tied=False).path
    model = tte_jax.load_model(path)
    before, after = parameters(model), parameters(tte_jax.load_model(path, quantise="int8"))
    assert before.keys() == after.keys()
    linear = {e.path: (int(e.stacked), e.inputs) for e in entries(model.config) if e.inputs}
    assert {name for name, w in after.items() if isinstance(w, Int8Weight)} == linear.keys()
    for name, whole in before.items():
        w, changed = np.asarray(whole), after[name]
        if not isinstance(changed, Int8Weight):
            np.testing.assert_array_equal(np.asarray(changed), w, err_msg=name)
            continue
        first, inputs = linear[name]
        summed = tuple(range(first, first + inputs))
        assert changed.q.dtype == jnp.int8 and changed.scale.dtype == jnp.float32
        scale = np.asarray(changed.scale)
        np.testing.assert_allclose(scale, np.abs(w).max(summed, keepdims=True) / 127, rtol=1e-6)
        moved = np.abs(np.asarray(changed.q, np.float32) * scale - w)
        assert (moved <= scale * 0.5001).all(), name
        assert np.abs(np.asarray(changed.q)).max() == 127


def test_product_is_that_of_the_rounded_weight() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 4, 5)).astype(np.float32)
    w[..., 2] = 0  # a channel without any weight
    int8 = quantise(jnp.asarray(w), (0, 1))
    x = jnp.asarray(rng.standard_normal((2, 6, 3, 4)).astype(np.float32))
    rounded = np.asarray(int8.q, np.float32) * np.asarray(int8.scale)
    ours = project("btnh,nhd->btd", x, int8)
    np.testing.assert_allclose(ours, np.einsum("btnh,nhd->btd", x, rounded), rtol=0, atol=1e-5)
    assert not np.asarray(ours)[..., 2].any()
    np.testing.assert_allclose(int8[:, 1:3], rounded[:, 1:3], rtol=1e-6)
    half = project("btnh,nhd->btd", x.astype(jnp.bfloat16), int8)
    assert half.dtype == jnp.bfloat16


def test_columns_are_those_of_the_rounded_weight() -> None:
    """As the reranker reads two of an output head."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((6, 9)).astype(np.float32))
    which = jnp.array([7, 2])
    int8 = quantise(w, (0,))
    whole = np.asarray(int8.q, np.float32) * np.asarray(int8.scale)
    np.testing.assert_array_equal(columns(int8, which), whole[:, [7, 2]])
    np.testing.assert_array_equal(columns(w, which), np.asarray(w)[:, [7, 2]])


def test_memory_is_a_quarter_of_float32(saved: Callable[..., Checkpoint]) -> None:
    path = saved("qwen2_vl", tied=True).path
    full = tte_jax.load_model(path)
    int8 = tte_jax.load_model(path, quantise="int8")
    linear = {e.path for e in entries(full.config) if e.inputs}
    before = sum(w.nbytes for name, w in parameters(full).items() if name in linear)
    quantised = [w for w in parameters(int8).values() if isinstance(w, Int8Weight)]
    assert before / 4 < sum(w.q.nbytes + w.scale.nbytes for w in quantised) < 0.3 * before


def test_generation(saved: Callable[..., Checkpoint]) -> None:
    batch = text_batch("right")
    model = tte_jax.load_model(saved("qwen3", tied=False).path, quantise="int8")
    out = model.generate(**batch, max_new_tokens=3)
    assert out.shape == (4, batch["input_ids"].shape[1] + 3)
    first = model(**batch).logits[0, int(batch["attention_mask"][0].sum()) - 1].argmax()
    assert out[0, -3] == first


def test_other_names_are_refused(saved: Callable[..., Checkpoint]) -> None:
    with pytest.raises(InvalidInputError, match="'int4'.*int8"):
        tte_jax.load_model(saved("qwen3", tied=True).path, quantise="int4")


def test_int8_is_not_exported(saved: Callable[..., Checkpoint], tmp_path: Path) -> None:
    model = tte_jax.load_model(saved("qwen3", tied=True).path, quantise="int8")
    with pytest.raises(UnsupportedError, match="without quantise"):
        hf.export(model.module, tmp_path)
    assert not list(tmp_path.iterdir())


def assert_equal_weights(one: tte_jax.Model, other: tte_jax.Model) -> None:
    ours, theirs = jax.tree.leaves(one.module), jax.tree.leaves(other.module)
    assert any(w.dtype == jnp.int8 for w in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_an_orbax_checkpoint_is_rounded_as_its_source(
    saved: Callable[..., Checkpoint], tmp_path: Path, family: str
) -> None:
    source = saved(family, tied=False).path
    convert(source, tmp_path / "orbax")
    ours = tte_jax.load_model(tmp_path / "orbax", quantise="int8")
    assert_equal_weights(ours, tte_jax.load_model(source, quantise="int8"))
    with pytest.raises(InvalidInputError, match="'int4'.*int8"):
        tte_jax.load_model(tmp_path / "orbax", quantise="int4")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_before_the_rounding(
    saved: Callable[..., Checkpoint], tmp_path: Path, dora: bool
) -> None:
    base = saved("qwen3", tied=False)
    settings = LoraConfig(
        r=4, lora_alpha=8, use_dora=dora, target_modules=["q_proj", "down_proj", "lm_head"]
    )
    tuned = get_peft_model(type(base.model).from_pretrained(base.path), settings)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    merged = tte_jax.load_model(base.path, adapter=tmp_path / "adapter")
    shutil.copytree(base.path, tmp_path / "merged")
    hf.export(merged.module, tmp_path / "merged")
    ours = tte_jax.load_model(base.path, adapter=tmp_path / "adapter", quantise="int8")
    assert_equal_weights(ours, tte_jax.load_model(tmp_path / "merged", quantise="int8"))
    batch = text_batch("right")
    real = batch["attention_mask"] > 0
    with torch.no_grad():
        expected = tuned(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy()
    plain = tte_jax.load_model(base.path, quantise="int8")(**batch).logits
    moved, rounding = np.abs(expected - plain)[real], np.abs(ours(**batch).logits - expected)[real]
    assert rounding.mean() < 0.1 * moved.mean(), "closer to PEFT's answers than without the adapter"
