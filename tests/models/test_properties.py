"""What may not change an answer: padding, the place of an image in the pack, the rest of a batch.

Random batches of random rows (texts, images of unequal shapes, both) in one fixed shape, so that a
family is compiled once; every example runs the same program on other arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tte_jax
from tests.models.conftest import (
    FAMILIES,
    IMAGE,
    PATCH_VALUES,
    VIDEO,
    VOCAB,
    Checkpoint,
    picture,
    text_row,
)
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.patches import Grid
from tte_jax.preprocess.positions import mrope_positions, text_positions
from tte_jax.preprocess.vision_plan import plan_vision

ROWS, WIDTH, PACK = 4, 32, 96
SIZES: list[Grid] = [(1, 2, 2), (1, 2, 6), (1, 4, 4), (1, 6, 4)]  # 24 patches at most
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Row:
    """A sequence and its images, each (patches, grid)."""

    ids: list[int]
    images: list[tuple[np.ndarray, Grid]]


def random_row(rng: np.random.Generator, *, images: bool) -> Row:
    """0 to 2 tokens, perhaps an image, 1 to 6 tokens; or 1 to 14 tokens."""
    if not images or rng.random() < 0.3:
        return Row(text_row(rng, int(rng.integers(1, 15))), [])
    grid = SIZES[rng.integers(len(SIZES))]
    patches, tokens = picture(rng, grid[1], grid[2])
    ids = text_row(rng, int(rng.integers(0, 3))) + tokens + text_row(rng, int(rng.integers(1, 7)))
    return Row(ids, [(patches, grid)])


@dataclass(frozen=True)
class Batch:
    """The arrays of one call; `valid` [ROWS, WIDTH] says which tokens are real."""

    ids: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    vis_idx: np.ndarray
    patches: np.ndarray
    grids: list[Grid]
    used: int


def place(rows: list[Row], starts: list[int], order: np.ndarray | None = None) -> Batch:
    """The rows in a batch, row i from column `starts[i]`, the images packed in `order`."""
    ids = np.zeros((ROWS, WIDTH), np.int32)
    valid = np.zeros((ROWS, WIDTH), bool)
    positions = np.zeros((ROWS, 3, WIDTH), np.int32)
    vis_idx = np.full((ROWS, WIDTH), -1, np.int32)
    images = [image for row in rows for image in row.images]
    order = np.arange(len(images)) if order is None else order
    sizes = [len(images[i][0]) for i in order]
    begins = dict(zip(order.tolist(), np.cumsum([0, *sizes[:-1]]).tolist(), strict=False))
    number = 0
    for at, row in enumerate(rows):
        here = slice(starts[at], starts[at] + len(row.ids))
        ids[at, here], valid[at, here] = row.ids, True
        grids = [grid for _, grid in row.images]
        if grids:
            positions[at, :, here], _ = mrope_positions(
                row.ids, grids, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=2
            )
        else:
            positions[at, :, here] = text_positions(len(row.ids))
        for patches, _ in row.images:
            where = np.flatnonzero(np.asarray(row.ids) == IMAGE) + starts[at]
            vis_idx[at, where] = begins[number] // 4 + np.arange(len(patches) // 4)
            number += 1
    packed = np.zeros((PACK, PATCH_VALUES), np.float32)
    used = sum(sizes)
    if used:
        packed[:used] = np.concatenate([images[i][0] for i in order])
    return Batch(ids, valid, positions, vis_idx, packed, [images[i][1] for i in order], used)


@jax.jit
def forward(module: MultimodalLM, ids: Any, valid: Any, positions: Any, *vision: Any) -> Any:
    vis = vis_idx = None
    if vision:
        vis_idx, patches, *plan = vision
        vis = module.encode_images(patches, *plan)
    hidden, _ = module.forward(ids, valid=valid, positions=positions, vis=vis, vis_idx=vis_idx)
    return module.logits(hidden)


def logits(model: tte_jax.Model, batch: Batch) -> np.ndarray:
    vision: tuple[Any, ...] = ()
    if model.config.vision is not None:
        plan = plan_vision(batch.grids, bucket=PACK, **model.config.vision.plan)
        vision = (batch.vis_idx, batch.patches[None], *(x[None] for x in plan.arrays))
    return np.asarray(
        forward(model.module, *map(jnp.asarray, (batch.ids, batch.valid, batch.positions)), *vision)
    )


def real(out: np.ndarray, batch: Batch) -> list[np.ndarray]:
    """The logits of each row's real tokens."""
    return [row[valid] for row, valid in zip(out, batch.valid, strict=True)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, saved: Callable[..., Checkpoint]) -> tte_jax.Model:
    return tte_jax.load_model(saved(request.param, tied=True).path)


def random_rows(model: tte_jax.Model, rng: np.random.Generator) -> list[Row]:
    return [random_row(rng, images=model.config.vision is not None) for _ in range(ROWS)]


def random_starts(rng: np.random.Generator, rows: list[Row]) -> list[int]:
    """Columns at which rows begin: padding on the left, on the right, or on both sides."""
    return [int(rng.integers(0, WIDTH - len(row.ids) + 1)) for row in rows]


@given(seed=SEEDS)
@EXAMPLES
def test_garbage_in_pads_changes_nothing(model: tte_jax.Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(model, rng)
    clean = place(rows, random_starts(rng, rows))
    pads = ~clean.valid
    tokens = np.where(rng.random(pads.shape) < 0.5, rng.integers(0, VOCAB, pads.shape), IMAGE)
    dirty = Batch(
        np.where(pads, tokens, clean.ids).astype(np.int32),
        clean.valid,
        np.where(pads[:, None], rng.integers(0, 999, (ROWS, 3, WIDTH), np.int32), clean.positions),
        np.where(pads, rng.integers(-1, PACK // 4, pads.shape, np.int32), clean.vis_idx),
        clean.patches.copy(),
        clean.grids,
        clean.used,
    )
    dirty.patches[clean.used :] = rng.normal(0, 100, (PACK - clean.used, PATCH_VALUES))
    before, after = logits(model, clean), logits(model, dirty)
    assert np.isfinite(before).all()
    for one, other in zip(real(before, clean), real(after, dirty), strict=True):
        np.testing.assert_array_equal(one, other)


@given(seed=SEEDS)
@EXAMPLES
def test_the_side_of_the_padding_changes_nothing(model: tte_jax.Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(model, rng)
    one, other = (place(rows, random_starts(rng, rows)) for _ in range(2))
    for a, b in zip(real(logits(model, one), one), real(logits(model, other), other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@given(seed=SEEDS)
@EXAMPLES
def test_the_order_of_images_in_the_pack_changes_nothing(model: tte_jax.Model, seed: int) -> None:
    if model.config.vision is None:
        pytest.skip("a text family has no images")
    rng = np.random.default_rng(seed)
    rows = random_rows(model, rng)
    starts = random_starts(rng, rows)
    straight = place(rows, starts)
    turned = place(rows, starts, rng.permutation(len(straight.grids)))
    a, b = logits(model, straight), logits(model, turned)
    np.testing.assert_allclose(a[straight.valid], b[straight.valid], rtol=0, atol=1e-5)


@given(seed=SEEDS)
@EXAMPLES
def test_the_rest_of_the_batch_changes_nothing(model: tte_jax.Model, seed: int) -> None:
    """A row keeps its logits among other rows, its image elsewhere in the pack."""
    rng = np.random.default_rng(seed)
    rows, others = random_rows(model, rng), random_rows(model, rng)
    mine, place_then, place_now = rows[0], int(rng.integers(ROWS)), int(rng.integers(ROWS))
    rows[place_then], others[place_now] = mine, mine
    start = int(rng.integers(0, WIDTH - len(mine.ids) + 1))
    starts_then, starts_now = random_starts(rng, rows), random_starts(rng, others)
    starts_then[place_then] = starts_now[place_now] = start
    then, now = place(rows, starts_then), place(others, starts_now)
    a = real(logits(model, then), then)[place_then]
    b = real(logits(model, now), now)[place_now]
    assert a.std() > 0.5  # otherwise the tolerance means nothing
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
