"""Layers that stand apart: the same memory, the same results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.stack import Apart, part
from tte_jax.models.text import DecoderLayers
from tte_jax.nn.linear import TurnedWeight
from tte_jax.preprocess.vision_plan import plan_vision
from tte_jax.weights import hf


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def model(request: pytest.FixtureRequest) -> MultimodalLM:
    folder = tiny_models.root() / f"apart-{request.param}"
    return hf.load(tiny_models.write_model(folder, family=request.param, roles=["reasoner"]))


def logits(model: MultimodalLM) -> np.ndarray:
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 3, 6))
    valid = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    run = jax.jit(lambda m: m.logits(m.forward(ids, valid=valid, positions=positions)[0]))
    return np.asarray(run(model))


def test_a_model_apart_computes_the_same(model: MultimodalLM) -> None:
    before = logits(model)
    copy = model.apart()
    np.testing.assert_allclose(logits(copy), before, atol=1e-5)
    # The model itself is as it was.
    assert isinstance(model.text.layers.weights(), dict)
    layers = copy.text.layers.weights()
    assert isinstance(layers, list) and len(layers) == model.config.text.layers


def test_a_turned_model_computes_the_same(model: MultimodalLM) -> None:
    turned = model.apart(turned=True)
    np.testing.assert_allclose(logits(turned), logits(model), atol=1e-5)
    weights = turned.text.layers.weights()
    assert isinstance(weights, list)
    kinds = {name for name, value in weights[0].items() if isinstance(value, TurnedWeight)}
    assert kinds == set(DecoderLayers.matrices)
    ids = (3, 400)
    np.testing.assert_array_equal(turned.text.head_rows(ids), model.text.head_rows(ids))


def test_memory_is_shared_where_it_is_aligned(model: MultimodalLM) -> None:
    whole = model.text.layers.weights()
    assert isinstance(whole, dict)
    stacked = whole["down_fd"]
    for i, one in enumerate(Apart(model.text.layers).weights()):
        here = one["down_fd"]
        np.testing.assert_array_equal(here, stacked[i])
        assert here.nbytes % 64 == 0
        at = stacked.unsafe_buffer_pointer() + i * here.nbytes
        assert here.unsafe_buffer_pointer() == at


def test_parts_of_both_forms() -> None:
    stacked = {"w": jnp.arange(6).reshape(3, 2)}
    listed = [{"w": row} for row in stacked["w"]]
    some, same = part(stacked, 1, 3), part(listed, 1, 3)
    assert isinstance(some, dict) and isinstance(same, list)
    np.testing.assert_array_equal(some["w"], jnp.stack([one["w"] for one in same]))


def test_images_are_encoded_the_same(model: MultimodalLM) -> None:
    vision = model.config.vision
    if vision is None:
        assert not hasattr(model, "visual")
        return
    plan = plan_vision([(1, 4, 4)], bucket=16, **vision.plan)
    patches = np.random.default_rng(0).normal(size=(1, 16, vision.patch_values))
    arrays = [jnp.asarray(x)[None] for x in plan.arrays]
    encode = jax.jit(lambda m: m.encode_images(jnp.asarray(patches, jnp.float32), *arrays))
    before = np.asarray(encode(model))
    np.testing.assert_allclose(encode(model.apart()), before, atol=1e-5)
    assert np.abs(before).max() > 1e-3
