"""Adapters that are being trained: PEFT and our own loader compute what training computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft import PeftModel

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, saved, text_batch  # noqa: F401
from training import parameters
from training.parameters import Split, Tuning
from tte_jax.errors import InvalidInputError
from tte_jax.model import Model
from tte_jax.models.shapes import shape_config
from tte_jax.nn.linear import AdaptedWeight, project
from tte_jax.weights import adapter as adapters
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs

# family, tied, settings
CASES = {
    "LoRA": ("qwen2_vl", True, Tuning("lora", rank=4, alpha=16)),
    "DoRA": ("qwen3", False, Tuning("dora", rank=4, alpha=8)),
    "LoRA on the tower": (
        "qwen3_vl",
        True,
        Tuning("lora", rank=4, alpha=8, targets=r"attn\.(qkv|proj)|mlp\.down_proj"),
    ),
}


def moved(trained: Any, seed: int = 0) -> Any:
    """As after training: fresh adapters change nothing, since B is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), trained
    )


@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_loader_say_what_training_said(
    saved: Callable[..., Checkpoint],  # noqa: F811
    tmp_path: Path,
    case: str,
) -> None:
    family, tied, tuning = CASES[case]
    base = saved(family, tied=tied)
    batch = images_batch("right") if family.endswith("vl") else text_batch("right")
    real = batch["attention_mask"] > 0
    parts, trained, frozen = parameters.split(hf.load(base.path), tuning, key=jax.random.key(0))
    fresh = Model(parts.assemble(trained, frozen))(**batch).logits
    plain, _ = base.answers(batch)
    np.testing.assert_allclose(fresh[real], plain[real], rtol=0, atol=1e-4)
    trained = moved(trained)
    ours = Model(parts.assemble(trained, frozen))(**batch).logits
    assert np.abs(ours - plain)[real].max() > 0.5, "the adapter changes the answers"
    path = tmp_path / "adapter"
    adapters.save(parameters.to_peft(parts, trained, base=str(base.path)), path)
    merged = tte_jax.load_model(base.path, adapter=path)(**batch).logits
    np.testing.assert_allclose(merged[real], ours[real], rtol=0, atol=1e-4)
    again = type(base.model).from_pretrained(base.path)
    model = PeftModel.from_pretrained(again, path).eval()
    theirs, _ = Checkpoint(path, model.base_model.model).answers(batch)
    np.testing.assert_allclose(theirs[real], ours[real], rtol=0, atol=1e-4)
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == sum(
        len(one["a"]) for one in trained.values()
    )


def test_dropout_of_the_adapter_s_input() -> None:
    """By hand: what is kept is scaled up, and the weight itself sees all of x."""
    rng = np.random.default_rng(0)
    x, w, a, b = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((2, 3, 8), (8, 2, 5), (8, 4), (4, 2, 5))
    )
    key = jax.random.key(3)
    weight = AdaptedWeight(w, a, b, key=key, scale=2.0, rate=0.25)
    kept = np.asarray(jax.random.bernoulli(key, 0.75, x.shape))
    assert 0 < kept.mean() < 1
    seen = np.where(kept, np.asarray(x) / 0.75, 0)
    expected = np.einsum("btd,dnh->btnh", x, w) + 2 * np.einsum("btd,dr,rnh->btnh", seen, a, b)
    found = project("btd,dnh->btnh", x, weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_layers_drop_differently(saved: Callable[..., Checkpoint]) -> None:  # noqa: F811
    parts, trained, frozen = parameters.split(
        hf.load(saved("qwen2", tied=False).path), Tuning(rank=2), key=jax.random.key(0)
    )
    assert isinstance(parts, Split)
    model = parts.assemble(trained, frozen, jax.random.key(1))
    keys = model.text.layers.q_dnh[...].key
    assert keys.shape == (2,)
    data = {jax.random.key_data(k).tobytes() for k in keys}
    data |= {jax.random.key_data(k).tobytes() for k in model.text.layers.k_dkh[...].key}
    assert len(data) == 4


def test_the_base_gets_no_gradient_and_full_tuning_spares_the_tower(
    saved: Callable[..., Checkpoint],  # noqa: F811
) -> None:
    model = hf.load(saved("qwen2_vl", tied=True).path)
    parts, trained, frozen = parameters.split(model, Tuning("full"), key=jax.random.key(0))
    assert not any(p.startswith("visual.") for p in trained)
    assert all(p.startswith("visual.") for p in frozen) and frozen
    every = nnx.to_pure_dict(nnx.state(parts.assemble(trained, frozen)))
    assert len(jax.tree.leaves(every)) == len(trained) + len(frozen)
    both, trained, frozen = parameters.split(
        model, Tuning("full", vision=True), key=jax.random.key(0)
    )
    assert not frozen and parameters.count(trained) == parameters.count(every)


def test_the_paper_s_adapters_have_the_published_size() -> None:
    """r (inputs + outputs) of seven projections in 28 layers, counted by hand for 7B."""
    entries = parameters.targeted(shape_config("7B"), Tuning())
    d, f, kv, r = 3584, 18_944, 512, 16
    by_hand = 28 * r * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    assert sum(28 * r * sum(e.hf_shape) for e in entries) == by_hand == 40_370_176


@pytest.mark.parametrize("targets", ["q_prj", r"lm_head", r"patch_embed\.proj"])
def test_targets_that_cannot_be_adapted(
    saved: Callable[..., Checkpoint],  # noqa: F811
    targets: str,
) -> None:
    config = hf.load(saved("qwen2_vl", tied=False).path).config
    with pytest.raises(InvalidInputError, match="targets"):
        parameters.targeted(config, Tuning(targets=targets))


def test_adapters_lie_as_their_weight_does() -> None:
    from tte_jax import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    where = sharding.sharding_of(mesh)
    make = partial(jnp.zeros, (3, 64, 4, 16))
    base = jax.jit(make, out_shardings=where("text.layers.q_dnh", (3, 64, 4, 16)))()
    entry = parameters.targeted(shape_config("2B"), Tuning(targets="q_proj"))[0]
    made = parameters._adapter(entry, base, Tuning(rank=4), jax.random.key(0))
    assert tuple(made["a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(made["b"].sharding.spec) == (None, None, "tp", None)
