"""GradCache against the direct gradient, packed sequences against lone ones, and memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tests.training.packed_items import inputs
from tests.training.test_contrastive_loss import labels
from training import batches, parameters
from training.batches import Item, Packing, SubBatch
from training.contrastive_loss import Embeddings, Labels, Rules, contrastive
from training.gradcache import GradCache
from tte_jax.embedder import Embedder
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs

PACKING = Packing(lengths=(8, 16), tokens=32, slots=3, patches=16)
QUERIES, NEGATIVES = 3, 1


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.load(tiny_models.vl_dir())


def split_buffer(buffer: jax.Array, rows: int, negatives: int) -> Embeddings:
    size = buffer.shape[-1]
    return Embeddings(
        queries=buffer[:rows],
        positives=buffer[rows : 2 * rows, None],
        negatives=buffer[2 * rows :].reshape(rows, negatives, size),
    )


def cache(parts: parameters.Split, rows: int, negatives: int, rules: Rules) -> GradCache:
    def encode(trained: Any, frozen: Any, batch: SubBatch, key: Any) -> jax.Array:
        return batches.encode(parts.assemble(trained["model"], frozen, key), batch, remat=True)

    def loss(buffer: jax.Array, trained: Any, known: Labels) -> Any:
        scale = jnp.exp(trained["log_scale"])
        return contrastive(split_buffer(buffer, rows, negatives), known, scale, rules)

    return GradCache(encode, loss)


@pytest.mark.parametrize("method", ["dora", "full"])  # DoRA has all that LoRA has
def test_the_gradient_is_the_direct_one(model: Any, method: parameters.Method) -> None:
    """With dropout, packed rows of two lengths, images, and a learned temperature."""
    tuning = parameters.Tuning(method, rank=4, alpha=8, dropout=0.3, vision=True)
    parts, trained, frozen = parameters.split(model, tuning, key=jax.random.key(0))
    if method != "full":  # B = 0 would hide half of the gradient
        rng = np.random.default_rng(0)
        for one in trained.values():
            one["b"] = jnp.asarray(0.3 * rng.standard_normal(one["b"].shape), jnp.float32)
    count = QUERIES * (2 + NEGATIVES)
    items = [Item(one, i) for i, one in enumerate(inputs(model.config, count))]
    made, fill = batches.pack([items], PACKING, model.config, nowhere=count)
    assert len(made) > 1 and {part.ids.shape[1] for (part,) in made} == {8, 16}
    assert any(part.patches is not None for (part,) in made)
    assert 0 < fill.pad_share < 1
    placed = [batches.place(part, None, model.config) for part in made]
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(len(placed))]
    run = cache(parts, QUERIES, NEGATIVES, Rules(symmetric=True, margin=0.2))
    wanted = {"model": trained, "log_scale": jnp.float32(1.5)}
    known = labels(QUERIES, 1, NEGATIVES)
    size = model.config.text.hidden_size
    (loss, _), grads = run(wanted, frozen, placed, keys, known, rows=count, size=size)
    (direct, _), expected = run.direct(wanted, frozen, placed, keys, known, rows=count, size=size)
    assert float(loss) == pytest.approx(float(direct), abs=1e-6)
    largest = 0.0
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        found = dict(jax.tree_util.tree_leaves_with_path(grads))[path]
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-6, err_msg=name)
        largest = max(largest, float(jnp.abs(value).max()))
    assert largest > 1e-3
    if method != "full":
        other = [jax.random.fold_in(key, 9) for key in keys]
        (moved, _), _ = run(wanted, frozen, placed, other, known, rows=count, size=size)
        assert abs(float(moved) - float(loss)) > 1e-4, "dropout does something"


def test_a_packed_sequence_is_what_the_embedder_serves(model: Any) -> None:
    every = inputs(model.config, 9, seed=3)
    made, _ = batches.pack(
        [[Item(one, i) for i, one in enumerate(every)]], PACKING, model.config, nowhere=9
    )
    found = np.zeros((9, model.config.text.hidden_size), np.float32)
    for (part,) in made:
        vectors = np.asarray(jax.jit(partial(batches.encode, remat=False))(model, part))
        there = part.dest < 9
        found[part.dest[there]] = vectors[there]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    served = tiny_models.embedder()
    assert isinstance(served, Embedder)
    from tte_jax.embedder import EmbedJob

    expected, _ = served.collect([f.result() for f in served.submit([EmbedJob(i) for i in every])])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_pads_change_nothing(model: Any) -> None:
    every = inputs(model.config, 3, seed=4)
    made, _ = batches.pack(
        [[Item(one, i) for i, one in enumerate(every)]], PACKING, model.config, nowhere=3
    )
    encode = jax.jit(partial(batches.encode, remat=False))
    rng = np.random.default_rng(0)
    for (part,) in made:
        pad = part.sequence == 0
        dirty = replace(part, ids=np.where(pad, rng.integers(5, 400, pad.shape), part.ids))
        there = part.dest < 3
        np.testing.assert_array_equal(
            np.asarray(encode(model, part))[there], np.asarray(encode(model, dirty))[there]
        )


def test_memory_does_not_grow_with_the_global_batch(model: Any) -> None:
    """Temporaries of the compiled programs, and the loss in blocks of rows: linear at most."""
    tuning = parameters.Tuning("lora", rank=4)
    parts, trained, frozen = parameters.split(model, tuning, key=jax.random.key(0))
    (part,), *_ = batches.pack(
        [[Item(one, i) for i, one in enumerate(inputs(model.config, 3))]],
        PACKING,
        model.config,
        nowhere=3,
    )[0]
    wanted = {"model": trained, "log_scale": jnp.float32(1.0)}
    size, key = model.config.text.hidden_size, jax.random.key(0)
    found: dict[int, tuple[int, int, int]] = {}
    for batch in (64, 4096):
        run = cache(parts, batch, 0, Rules(rows=64))
        buffer = jax.ShapeDtypeStruct((2 * batch, size), jnp.float32)
        like = jax.eval_shape(lambda x: x, wanted)
        programs = (
            run.forward.lower(wanted, frozen, part, key, buffer),
            run.backward.lower(wanted, frozen, part, key, buffer, like),
            run.loss.lower(buffer, wanted, labels(batch)),
        )
        sizes = [p.compile().memory_analysis().temp_size_in_bytes for p in programs]
        found[batch] = (sizes[0], sizes[1], sizes[2])
    print(found)
    assert found[4096][0] <= 1.02 * found[64][0]
    assert found[4096][1] <= 1.02 * found[64][1]
    # The loss holds 64 rows of logits and the vectors themselves, not [batch, batch] logits.
    assert found[4096][2] < 4 * 4096 * (20 * 64 + 20 * size)
    assert found[4096][2] < 4 * 4096 * 4096
