"""Normalisation in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Array:
    """x / rms(x) * weight; statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Array:
    """(x - mean) / std * weight + bias; statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * scale).astype(x.dtype) * weight + bias


def l2_normalise(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / |x| in float32; a zero vector stays zero."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x32), -1, keepdims=True), 1e-24))
