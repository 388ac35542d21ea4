"""A few places of every row."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from tte_jax.nn.linear import explicit_spec


def at_places(x: Array, places: Int[Array, "B J"]) -> Array:
    """[B T ...] → [B J ...]: for each row, what stands at its `places`; rows stay split as x is.

    An x of one row is that of every row.
    """
    if x.shape[0] == 1 != places.shape[0]:
        return x[0][places]
    rows = jnp.arange(x.shape[0])[:, None]
    if (split := explicit_spec(x)) is None:
        return x[rows, places]
    return x.at[rows, places].get(out_sharding=PartitionSpec(split[0], None, *split[2:]))
