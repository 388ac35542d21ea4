"""Our models against the reference library on the same weights and the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tte_jax
from tests.models.conftest import (
    EOS,
    IMAGE,
    PAD,
    PATCH_VALUES,
    VIDEO,
    VOCAB,
    Checkpoint,
    images_batch,
    padded,
    picture,
    text_batch,
    text_row,
    videos_batch,
)
from tte_jax.errors import InvalidInputError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache
from tte_jax.preprocess.patches import Grid
from tte_jax.preprocess.positions import text_positions
from tte_jax.preprocess.vision_plan import plan_vision

MULTIMODAL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
KINDS = [(family, tied) for family in ["qwen2", *MULTIMODAL, "qwen3"] for tied in (True, False)]
Batch = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def loaded(
    saved: Callable[..., Checkpoint],
) -> Callable[..., tuple[Checkpoint, tte_jax.Model]]:
    models: dict[tuple[str, bool], tte_jax.Model] = {}

    def get(family: str, tied: bool) -> tuple[Checkpoint, tte_jax.Model]:
        checkpoint = saved(family, tied=tied)
        if (family, tied) not in models:
            models[family, tied] = tte_jax.load_model(checkpoint.path)
        return checkpoint, models[family, tied]

    return get


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def assert_equal_answers(checkpoint: Checkpoint, model: tte_jax.Model, batch: Batch) -> None:
    logits, hidden = checkpoint.answers(batch)
    out = model(**batch)
    real = batch["attention_mask"] > 0
    assert out.logits.shape == logits.shape and out.last_hidden_state.shape == hidden.shape
    assert out.logits.dtype == np.float32
    assert logits[real].std() > 0.5  # otherwise the tolerances below mean nothing
    np.testing.assert_allclose(out.logits[real], logits[real], rtol=0, atol=1e-4)
    assert cosine(out.last_hidden_state[real], hidden[real]).min() >= 0.99999


@pytest.mark.parametrize(("family", "tied"), KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_forward(loaded, family: str, tied: bool, side: str) -> None:
    assert_equal_answers(*loaded(family, tied), text_batch(side))


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_images_forward(loaded, family: str, tied: bool, side: str) -> None:
    batch = images_batch(side)
    shapes = {tuple(g[1:]) for g in batch["image_grid_thw"].tolist()}
    assert len(shapes) == 4 and any(h != w for h, w in shapes)
    assert_equal_answers(*loaded(family, tied), batch)


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_videos_forward(loaded, family: str, side: str) -> None:
    assert_equal_answers(*loaded(family, True), videos_batch(family, side))


@pytest.mark.parametrize("family", MULTIMODAL)
def test_greedy_videos(loaded, family: str) -> None:
    checkpoint, model = loaded(family, True)
    assert_equal_continuations(checkpoint, model, videos_batch(family, "left"))


PACK = 128  # one padded length for all vision tests, so that the tower is compiled once


@jax.jit
def tower(module: MultimodalLM, patches: Any, *plan: Any) -> jax.Array:
    return module.encode_images(patches, *plan)


def encode(
    model: tte_jax.Model, patches: np.ndarray, grids: list[Grid], pads: np.ndarray | None = None
) -> np.ndarray:
    """Features of the images of one pack, without those of its padding."""
    assert model.config.vision is not None
    plan = plan_vision(grids, bucket=PACK, **model.config.vision.plan)
    pack = np.zeros((PACK, PATCH_VALUES), np.float32) if pads is None else pads.copy()
    pack[: plan.n] = patches
    features = tower(model.module, pack[None], *(x[None] for x in plan.arrays))
    return np.asarray(features)[: plan.n // 4]


@torch.no_grad()
def reference_vision(checkpoint: Checkpoint, patches: np.ndarray, grids: list[Grid]) -> np.ndarray:
    visual = checkpoint.model.model.visual
    return visual(torch.from_numpy(patches), grid_thw=torch.tensor(grids)).pooler_output.numpy()


def test_images_matter(loaded) -> None:
    # Or the parity above could hold for a model that ignores what it is shown.
    _, model = loaded("qwen2_vl", True)
    batch = images_batch("right")
    other = {**batch, "pixel_values": batch["pixel_values"][::-1].copy()}
    real = batch["attention_mask"] > 0
    changed = np.abs(model(**batch).logits - model(**other).logits)[real]
    assert changed.max() > 0.1


def test_embedding_of_the_last_token(loaded) -> None:
    checkpoint, model = loaded("qwen2_vl", True)
    batch = images_batch("left")
    _, hidden = checkpoint.answers(batch)
    pooled = model(**batch).last_hidden_state[:, -1]
    assert cosine(pooled, hidden[:, -1]).min() >= 0.99999
    # Different inputs must not all have the same embedding.
    assert cosine(pooled[0], pooled[1]) < 0.9


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_greedy_text(loaded, family: str, tied: bool) -> None:
    checkpoint, model = loaded(family, tied)
    assert_equal_continuations(checkpoint, model, text_batch("left"))


@pytest.mark.parametrize("end_with_text", [True, False])
def test_greedy_images(loaded, end_with_text: bool) -> None:
    checkpoint, model = loaded("qwen2_vl", True)
    assert_equal_continuations(checkpoint, model, images_batch("left", end_with_text=end_with_text))


def assert_equal_continuations(
    checkpoint: Checkpoint, model: tte_jax.Model, batch: Batch, tokens: int = 10
) -> None:
    expected = checkpoint.continuation(batch, tokens)
    assert len(np.unique(expected)) > 8  # non-degenerate: not one token over and over
    out = model.generate(**batch, max_new_tokens=tokens, eos_token_id=EOS, pad_token_id=PAD)
    np.testing.assert_array_equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    new = out[:, batch["input_ids"].shape[1] :]
    new = np.pad(new, ((0, 0), (0, tokens - new.shape[1])), constant_values=PAD)
    np.testing.assert_array_equal(new, expected)


def test_greedy_does_not_depend_on_the_side_of_padding(loaded) -> None:
    # The reference does: it warns against right padding. Ours may not.
    _, model = loaded("qwen2_vl", True)
    new = [
        model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
        for batch in (images_batch("left"), images_batch("right"))
    ]
    np.testing.assert_array_equal(new[0], new[1])


def test_greedy_stops(loaded) -> None:
    checkpoint, model = loaded("qwen3", True)
    batch = text_batch("left")
    free = checkpoint.continuation(batch, 6)
    stop = int(free[0, 2])
    out = model.generate(**batch, max_new_tokens=6, eos_token_id=[EOS, stop], pad_token_id=PAD)
    new = out[:, batch["input_ids"].shape[1] :]
    for row, expected in zip(new, free, strict=True):
        ends = np.flatnonzero((expected == stop) | (expected == EOS))
        end = ends[0] + 1 if len(ends) else len(row)
        np.testing.assert_array_equal(row[:end], expected[: len(row)][:end])
        assert not row[end:].any()  # PAD is 0


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_garbage_in_pads_changes_nothing(loaded, family: str, side: str) -> None:
    _, model = loaded(family, True)
    batch = images_batch(side)
    real = batch["attention_mask"] > 0
    clean = model(**batch)
    rng = np.random.default_rng(5)
    for garbage in (rng.integers(0, VOCAB, real.shape), np.full(real.shape, IMAGE)):
        ids = np.where(real, batch["input_ids"], garbage)
        dirty = model(**{**batch, "input_ids": ids})
        np.testing.assert_array_equal(dirty.logits[real], clean.logits[real])
    assert np.isfinite(clean.logits).all()


@pytest.mark.parametrize("family", MULTIMODAL)
def test_garbage_in_vision_pads_changes_nothing(loaded, family: str) -> None:
    _, model = loaded(family, True)
    batch = images_batch("right")
    grids = [tuple(g) for g in batch["image_grid_thw"].tolist()]
    clean = encode(model, batch["pixel_values"], grids)
    noise = 100 * np.random.default_rng(5).standard_normal((PACK, PATCH_VALUES))
    dirty = encode(model, batch["pixel_values"], grids, pads=noise.astype(np.float32))
    np.testing.assert_array_equal(dirty, clean)
    assert np.isfinite(clean).all()


@pytest.mark.parametrize("family", MULTIMODAL)
def test_order_in_the_pack_changes_nothing(loaded, family: str) -> None:
    _, model = loaded(family, True)
    batch = images_batch("right")
    grids: list[Grid] = [(t, h, w) for t, h, w in batch["image_grid_thw"].tolist()]
    sizes = [h * w for _, h, w in grids]
    images = np.split(batch["pixel_values"], np.cumsum(sizes)[:-1])
    straight = np.split(encode(model, np.concatenate(images), grids), np.cumsum(sizes)[:-1] // 4)
    order = [2, 0, 3, 1]
    turned = encode(model, np.concatenate([images[i] for i in order]), [grids[i] for i in order])
    expected = np.concatenate([straight[i] for i in order])
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_packed_vision_is_unpacked_vision(loaded) -> None:
    checkpoint, model = loaded("qwen2_vl", True)
    batch = images_batch("right")
    grids = [tuple(g) for g in batch["image_grid_thw"].tolist()]
    packed = encode(model, batch["pixel_values"], grids)
    ends = np.cumsum([h * w for _, h, w in grids])
    images = np.split(batch["pixel_values"], ends[:-1])
    singly = [encode(model, p, [grid]) for p, grid in zip(images, grids, strict=True)]
    np.testing.assert_allclose(packed, np.concatenate(singly), rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        packed, reference_vision(checkpoint, batch["pixel_values"], grids), rtol=0, atol=5e-5
    )


def test_video_frames_attend_only_to_themselves(loaded) -> None:
    checkpoint, model = loaded("qwen2_vl", True)
    grids = [(3, 4, 2), (1, 2, 6), (2, 2, 2)]
    rng = np.random.default_rng(7)
    patches = np.concatenate([picture(rng, t * h, w)[0] for t, h, w in grids])
    np.testing.assert_allclose(
        encode(model, patches, grids),
        reference_vision(checkpoint, patches, grids),
        rtol=0,
        atol=5e-5,
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_a_batch_is_its_rows(loaded, family: str) -> None:
    _, model = loaded(family, True)
    batch = text_batch("right")
    together = model(**batch)
    for row in (0, 3):  # each length compiles anew
        n = int(batch["attention_mask"][row].sum())
        alone = model(batch["input_ids"][row : row + 1, :n])
        np.testing.assert_allclose(together.logits[row, :n], alone.logits[0], rtol=0, atol=2e-5)


def test_prefix_and_rest_are_the_whole(loaded) -> None:
    """A cache of batch 1 that several rows share gives what each whole sequence gives."""
    _, model = loaded("qwen3", False)
    rng = np.random.default_rng(3)
    prefix, tails = text_row(rng, 9), [text_row(rng, 5), text_row(rng, 5)]
    whole = model(np.array([prefix + tail for tail in tails]))
    forward = jax.jit(MultimodalLM.forward)
    _, (k, v) = forward(
        model.module,
        jnp.array([prefix]),
        valid=jnp.ones((1, 9), bool),
        positions=jnp.asarray(text_positions(9))[None],
    )
    room = [(0, 0), (0, 0), (0, 4), (0, 0), (0, 0)]
    cache = KVCache(  # places beyond the length hold garbage
        k=jnp.pad(k, room, constant_values=50.0),
        v=jnp.pad(v, room, constant_values=50.0),
        length=jnp.array([9]),
    )
    hidden, _ = forward(
        model.module,
        jnp.array(tails),
        valid=jnp.ones((2, 5), bool),
        positions=jnp.broadcast_to(jnp.asarray(text_positions(5, 9)), (2, 3, 5)),
        prefix=cache,
    )
    np.testing.assert_allclose(
        np.asarray(hidden), whole.last_hidden_state[:, 9:], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("family", MULTIMODAL)
def test_legacy_positions_are_those_of_plain_text(loaded, family: str) -> None:
    """transformers up to 4.52 saw an image only behind vision start; other pads were text."""
    checkpoint, model = loaded(family, True)
    legacy = tte_jax.Model(model.module, mrope_mode="legacy")
    rng = np.random.default_rng(6)
    patches, tokens = picture(rng, 4, 6)
    bare = [token for token in tokens if token == IMAGE]
    batch: Batch = {
        **padded([bare + text_row(rng, 4)], "right"),
        "pixel_values": patches,
        "image_grid_thw": np.array([[1, 4, 6]], np.int64),
    }
    length = batch["input_ids"].shape[1]
    plain = np.broadcast_to(np.arange(length), (3, 1, length)).copy()
    expected, _ = checkpoint.answers({**batch, "position_ids": plain})
    out = legacy(**batch).logits
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    assert np.abs(model(**batch).logits - expected).max() > 0.01  # another answer, in "current"
    behind = {
        **padded([text_row(rng, 2) + tokens[:-1] + text_row(rng, 1)], "right"),
        "pixel_values": patches,
        "image_grid_thw": batch["image_grid_thw"],
    }
    np.testing.assert_array_equal(legacy(**behind).logits, model(**behind).logits)


def test_wrong_arrays_are_named(loaded) -> None:
    _, model = loaded("qwen2_vl", True)
    batch = images_batch("right")
    broken = [
        ({"pixel_values": batch["pixel_values"][:-4]}, "pixel_values"),
        ({"pixel_values": batch["pixel_values"][:, :-1]}, "pixel_values"),
        ({"image_grid_thw": None}, "image_grid_thw"),
        ({"input_ids": np.where(batch["input_ids"] == IMAGE, 5, batch["input_ids"])}, "input_ids"),
        ({"attention_mask": batch["attention_mask"][:, 1:]}, "attention_mask"),
        ({"attention_mask": 0 * batch["attention_mask"]}, "attention_mask"),
    ]
    for change, field in broken:
        with pytest.raises(InvalidInputError) as caught:
            model(**{**batch, **change})
        assert caught.value.field == field
    with pytest.raises(InvalidInputError, match="placeholders"):
        model(np.array([[5, VIDEO, VIDEO]]))
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        model.generate(np.array([[5]]), max_new_tokens=0)
    _, text = loaded("qwen3", True)
    with pytest.raises(InvalidInputError, match="text only"):
        text(**batch)


def test_positions_follow_the_rows(loaded) -> None:
    """Images of one row may not move to another: rows in another order, answers in that order."""
    _, model = loaded("qwen2_vl", True)
    rng = np.random.default_rng(11)
    small, wide = picture(rng, 2, 4), picture(rng, 2, 8)
    rows = [small[1] + text_row(rng, 2), text_row(rng, 3), wide[1] + text_row(rng, 2)]

    def run(order: list[int], images: list, grids: list[list[int]]) -> np.ndarray:
        batch = padded([rows[i] for i in order], "right")
        pixels = np.concatenate([patches for patches, _ in images])
        return model(**batch, pixel_values=pixels, image_grid_thw=np.array(grids)).logits

    forward = run([0, 1, 2], [small, wide], [[1, 2, 4], [1, 2, 8]])
    backward = run([2, 1, 0], [wide, small], [[1, 2, 8], [1, 2, 4]])
    for i, row in enumerate(rows):
        n = len(row)
        np.testing.assert_allclose(forward[i, :n], backward[2 - i, :n], rtol=0, atol=2e-5)
