"""Images during training: turned or spoilt on the host; augmented and cut into patches on the
device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageFilter

# Normalisation of the reference processor (CLIP's statistics); the same numbers stand in the
# built-in model's preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def turned(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[S S 3] uint8, mostly a little turned and sheared about its middle; white comes in."""
    if rng.random() < 0.3:
        return picture
    angle, shear = np.deg2rad(rng.normal(0.0, 8.0)), rng.uniform(-0.12, 0.12)
    a, b, d, e = np.cos(angle), np.sin(angle) + shear, -np.sin(angle), np.cos(angle)
    middle = (len(picture) - 1) / 2
    matrix = (a, b, middle * (1 - a - b), d, e, middle * (1 - d - e))
    image = Image.fromarray(picture).transform(
        (len(picture), len(picture)),
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )
    return np.asarray(image)


def spoil(picture: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A worse picture of the same thing; `strength` in [0, 1]. [H, W, 3] uint8 in and out."""
    image = Image.fromarray(picture)
    side = image.width
    if rng.random() < strength:
        angle = rng.uniform(-25, 25) * strength
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    if rng.random() < strength:
        cut = int(side * 0.18 * strength)
        left, top = (int(edge) for edge in rng.integers(0, cut + 1, 2))
        box = (left, top, side - cut + left, side - cut + top)
        image = image.crop(box).resize((side, side))
    if rng.random() < 0.6 * strength:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.5))))
    if rng.random() < 0.3 * strength:
        image = image.convert("L").convert("RGB")
    spoilt = np.asarray(image, np.float32)
    spoilt = spoilt + rng.normal(0, 18 * strength, spoilt.shape)
    return np.clip(spoilt, 0, 255).astype(np.uint8)


def augment(
    key: Array,
    images: UInt8[Array, "B S S 3"],
    *,
    gentle: Bool[Array, " B"],
    may_flip: Bool[Array, " B"],
    size: int,
) -> Float[Array, "B size size 3"]:
    """Random scale, aspect, shift, mirror image and colour; the outside is white.

    Args:
      key: one PRNG key for the batch.
      images: square uint8 images on any background.
      gentle: colour carries the meaning (skin tones, flags, "red circle"): nearly leave it alone.
      may_flip: mirroring keeps the meaning (not for arrows or hands pointing left).
      size: side of the result in pixels.

    Returns:
      float32 in [0, 1].
    """
    batch, side = images.shape[0], images.shape[1]
    keys = jax.random.split(key, 8)
    # Zero outside the image becomes white after the inversion.
    dark = 1.0 - images.astype(jnp.float32) / 255.0
    flip = may_flip & jax.random.bernoulli(keys[0], 0.5, (batch,))
    dark = jnp.where(flip[:, None, None, None], dark[:, :, ::-1], dark)
    ratio = size / side
    zoom = jax.random.uniform(keys[1], (batch, 1), minval=0.75, maxval=1.12)
    aspect = jnp.exp(jax.random.uniform(keys[2], (batch, 2), minval=-0.1, maxval=0.1))
    scale = ratio * zoom * aspect
    slack = jax.random.uniform(keys[3], (batch, 2), minval=-0.08, maxval=0.08) * size
    offset = (size - side * scale) / 2 + slack

    @partial(jax.vmap)
    def place(image: Array, scale: Array, offset: Array) -> Array:
        return jax.image.scale_and_translate(
            image, (size, size, 3), (0, 1), scale, offset, method="linear", antialias=True
        )

    image = 1.0 - place(dark, scale, offset)

    def spread(key: Array, width: float, gentle_width: float, shape: tuple[int, ...]) -> Array:
        width_b = jnp.where(gentle, gentle_width, width)[:, None, None, None]
        return width_b * jax.random.uniform(key, (batch, *shape), minval=-1.0, maxval=1.0)

    grey = jnp.sum(image * _GREY, axis=-1, keepdims=True)
    image = grey + (1.0 + spread(keys[4], 0.6, 0.1, (1, 1, 1))) * (image - grey)
    image = image * (1.0 + spread(keys[5], 0.15, 0.03, (1, 1, 3)))
    image = (image - 0.5) * (1.0 + spread(keys[6], 0.25, 0.08, (1, 1, 1))) + 0.5
    drop = ~gentle & jax.random.bernoulli(keys[7], 0.08, (batch,))
    return jnp.clip(jnp.where(drop[:, None, None, None], grey, image), 0.0, 1.0)


def to_patches(
    images: Float[Array, "B S S 3"], *, patch: int = 14, merge: int = 2, temporal: int = 2
) -> Float[Array, "B P C"]:
    """Normalised patches in merge-block order, as `tte_jax.preprocess.patches` makes them."""
    batch, side = images.shape[0], images.shape[1]
    blocks = side // (patch * merge)
    x = (images - jnp.asarray(MEAN)) / jnp.asarray(STD)
    x = x.reshape(batch, blocks, merge, patch, blocks, merge, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # B bh bw mh mw 3 p p
    x = jnp.repeat(x[:, :, :, :, :, :, None], temporal, axis=6)  # a still image is two equal frames
    return x.reshape(batch, (side // patch) ** 2, 3 * temporal * patch * patch)


def patch_coordinates(side: int, *, patch: int = 14, merge: int = 2) -> np.ndarray:
    """[P, 2] int32 row and column of each patch of a square image, in merge-block order."""
    n = side // patch
    rows, columns = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    both = np.stack([rows, columns], axis=-1).reshape(n // merge, merge, n // merge, merge, 2)
    return both.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)
