"""The slots: keys and values of the sequences in them, and what decides their next tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tte_jax.engine.layout import ONE_DEVICE, Layout
from tte_jax.engine.next_token import Control
from tte_jax.models.multimodal import MultimodalLM


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The slots; donated to every program that changes them.

    Attributes:
      k, v: [L B S K H] keys and values; place j of slot b counts when j < length[b].
      length: [B] int32 filled places.
      next_pos: [B] int32 rotary position of the next token (all three axes are equal for text).
      control: see `Control`.
    """

    k: Array
    v: Array
    length: Array
    next_pos: Array
    control: Control


def empty_state(
    model: MultimodalLM,
    *,
    slots: int,
    length: int,
    dtype: jnp.dtype | None = None,
    layout: Layout = ONE_DEVICE,
) -> DecodeState:
    """All slots free. The cache takes 2 * L * slots * length * K * H values."""
    dtype = dtype or model.text.norm_d[...].dtype
    cache = layout.cache(model.config.text, dtype, slots, length)
    place = layout.whole(jnp.int32, slots).sharding

    # Distinct arrays: donation refuses one buffer given twice.
    def full(value: Any, dtype: Any) -> Array:
        return jnp.full((slots,), value, dtype, device=place)

    return DecodeState(
        k=jnp.zeros(cache.shape, dtype, device=cache.sharding),
        v=jnp.zeros(cache.shape, dtype, device=cache.sharding),
        length=full(0, jnp.int32),
        next_pos=full(0, jnp.int32),
        control=Control(
            last_token=full(0, jnp.int32),
            generated=full(0, jnp.int32),
            limit=full(0, jnp.int32),
            close_at=full(0, jnp.int32),
            forced=full(-1, jnp.int32),
            matched=full(0, jnp.int32),
            closed=full(False, bool),
            done=full(True, bool),
            failed=full(False, bool),
            temperature=full(0.0, jnp.float32),
            top_p=full(1.0, jnp.float32),
            seed=full(0, jnp.uint32),
        ),
    )


def abstract_state(model: MultimodalLM, *, slots: int, length: int, layout: Layout) -> DecodeState:
    """Shapes, dtypes and shardings of `empty_state`."""
    made = jax.eval_shape(lambda: empty_state(model, slots=slots, length=length))
    cache = layout.cache(model.config.text, made.k.dtype, slots, length)
    others = jax.tree.map(lambda x: layout.whole(x.dtype, *x.shape), made)
    return replace(others, k=cache, v=cache)


def cached(new: Array, cache: Array) -> Array:
    """Keys or values as a slot keeps them: never NaN or infinite.

    The sequence that made such numbers fails by its logits in the same dispatch. Left in the slot
    they would reach the next one there: a masked place has weight 0, and 0 * NaN is NaN.
    """
    return jnp.where(jnp.isfinite(new), new, 0).astype(cache.dtype)
