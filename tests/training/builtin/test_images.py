"""Pictures on the device: the same patches as at serving time, and augmentation that stays sane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from training import builtin
from training.builtin import images
from tte_jax.preprocess.patches import ImageConfig, patchify
from tte_jax.preprocess.vision_plan import plan_vision


@pytest.mark.parametrize("side", [56, 84, 112])
def test_patches_equal_the_serving_path(side: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    config = ImageConfig(min_pixels=side**2, max_pixels=side**2)
    served, grid = patchify(Image.fromarray(picture), config)
    trained = images.to_patches(jnp.asarray(picture[None], jnp.float32) / 255.0)[0]
    assert grid == (1, side // 14, side // 14)
    np.testing.assert_allclose(np.asarray(trained), served, atol=2e-6)
    plan = plan_vision([grid], merge_size=2)
    np.testing.assert_array_equal(images.patch_coordinates(side), plan.hw)


def augmented(picture: np.ndarray, *, gentle: bool, flip: bool, seed: int) -> np.ndarray:
    batch = jnp.asarray(np.repeat(picture[None], 8, 0))
    flags = jnp.full(8, gentle), jnp.full(8, flip)
    return np.asarray(
        images.augment(
            jax.random.key(seed), batch, gentle=flags[0], may_flip=flags[1], size=builtin.SIDE
        )
    )


def test_augmentation_keeps_the_range_the_size_and_a_white_border() -> None:
    picture = np.full((112, 112, 3), 255, np.uint8)
    picture[30:80, 30:80] = (200, 30, 30)
    out = augmented(picture, gentle=True, flip=False, seed=0)
    assert out.shape == (8, builtin.SIDE, builtin.SIDE, 3)
    assert 0.0 <= out.min() and out.max() <= 1.0
    assert out[:, 0, 0].min() > 0.9


def test_gentle_pictures_keep_their_colour() -> None:
    picture = np.full((112, 112, 3), (200, 120, 60), np.uint8)
    centre = (slice(None), builtin.SIDE // 2, builtin.SIDE // 2)
    true = np.array([200, 120, 60]) / 255
    mild = np.abs(augmented(picture, gentle=True, flip=False, seed=1)[centre] - true).max()
    wild = np.abs(augmented(picture, gentle=False, flip=False, seed=1)[centre] - true).max()
    assert mild < 0.12 < wild


def test_only_pictures_that_may_be_mirrored_are() -> None:
    picture = np.full((112, 112, 3), 255, np.uint8)
    picture[20:92, 20:40] = 0  # a bar on the left

    def bar_on_the_left(out: np.ndarray) -> np.ndarray:
        half = builtin.SIDE // 2
        return out[:, :, :half].mean((1, 2, 3)) < out[:, :, half:].mean((1, 2, 3))

    assert bar_on_the_left(augmented(picture, gentle=True, flip=False, seed=2)).all()
    flipped = bar_on_the_left(augmented(picture, gentle=True, flip=True, seed=2))
    assert flipped.any() and not flipped.all()
