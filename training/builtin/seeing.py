"""What a unified model's tower makes of training pictures: features, the mean of each concept, and
how art styles move them."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from training import builtin
from training.builtin import images
from training.builtin.sampling import ImageTable
from training.data.emoji import EmojiData
from tte_jax.models.multimodal import MultimodalLM

_TOGETHER = 200  # pictures of one pass


def see(model: MultimodalLM, pixels: Array) -> Array:
    """[M S S 3] in [0, 1] → [M * features, D]."""
    patches = images.to_patches(pixels)
    hw = jnp.asarray(images.patch_coordinates(pixels.shape[1]))
    hw = jnp.broadcast_to(hw, (patches.shape[0], *hw.shape))
    segments = jnp.ones(patches.shape[:2], jnp.int32)
    return model.encode_images(patches, hw, segments, unroll=True)


def seen(model: MultimodalLM, data: EmojiData, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Features [n, features, D] of the pictures of `rows`, some at a time, in order."""
    shape = (builtin.SIDE, builtin.SIDE, 3)

    @jax.jit
    def look(model: MultimodalLM, part: Array) -> Array:
        pixels = part.astype(jnp.float32) / 255.0
        return see(model, jax.image.resize(pixels, (len(part), *shape), "linear", antialias=True))

    for start in range(0, len(rows), _TOGETHER):
        part = rows[start : start + _TOGETHER]
        # The last pass is filled up, so that one program does all.
        filled = np.concatenate([part, np.repeat(part[-1:], min(_TOGETHER, len(rows)) - len(part))])
        found = np.asarray(look(model, jnp.asarray(data.images[filled])))
        yield found.reshape(len(filled), -1, found.shape[-1])[: len(part)]


def prototypes(model: MultimodalLM, data: EmojiData, table: ImageTable) -> np.ndarray:
    """[C, D] mean feature of the artists' drawings of each concept of `table`."""
    rows = data.rows("train", originals=True)
    means = np.concatenate([part.mean(1) for part in seen(model, data, rows)])
    of = np.searchsorted(table.concepts, data.concept_ids[rows])
    sums = np.zeros((len(table.concepts), means.shape[1]), np.float32)
    np.add.at(sums, of, means)
    return sums / np.bincount(of, minlength=len(sums))[:, None]


def style_residuals(model: MultimodalLM, data: EmojiData, concepts: int = 400) -> Array:
    """[N, features, D]: how the features of drawings of one concept in different training styles
    differ from their mean. N ≥ 3 * `concepts`."""
    rows = data.rows("train", originals=True)
    ids, counts = np.unique(data.concept_ids[rows], return_counts=True)
    ids = ids[counts >= 3]
    chosen = np.random.default_rng(0).permutation(ids)[:concepts]
    grouped = [rows[data.concept_ids[rows] == c] for c in chosen]
    features = np.concatenate(list(seen(model, data, np.concatenate(grouped))))
    ends = np.cumsum([len(g) for g in grouped])[:-1]
    return jnp.asarray(np.concatenate([part - part.mean(0) for part in np.split(features, ends)]))
