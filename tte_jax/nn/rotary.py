"""Rotary position embedding: 1-D, multimodal (M-RoPE) and the vision tower's 2-D form.

All three are one computation: every frequency of a head reads one *axis* of the position. A text
model has a single axis; M-RoPE spreads the frequencies over (time, height, width); the vision
tower over (height, width). Angles are float32 whatever the model's dtype.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(size: int, theta: float) -> np.ndarray:
    """[size / 2] float32 inverse frequencies, theta^(-2i/size)."""
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)


def rotary_tables(
    positions: Int[Array, "B A T"], axes: tuple[int, ...], inverse: np.ndarray
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosine and sine tables.

    Args:
      positions: int32, one row per axis.
      axes: for each of the H/2 frequencies, the row of `positions` it reads.
      inverse: [H/2] float32 inverse frequencies.
    """
    picked = positions.astype(jnp.float32)[:, np.asarray(axes), :]  # B H/2 T
    angles = jnp.swapaxes(picked, 1, 2) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]); computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos + turned * sin).astype(x.dtype)
