"""Grouped-query attention: the one seam through which every model attends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from tte_jax.nn.linear import explicit_spec

# Finite, so that a row without any visible key gives a uniform softmax instead of NaN: the rows of
# padding tokens are such rows, and nothing reads them.
MASKED = -1e30


class Prefix(NamedTuple):
    """Keys and values computed earlier, attended to beside the new ones without copying them.

    Attributes:
      k, v: [Bp S K H] with Bp = 1 (shared by the whole batch) or Bp = B.
      mask: bool, broadcastable to [B T S]; True where a query may look.
    """

    k: Array
    v: Array
    mask: Array


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #T S"],
    prefix: Sequence[Prefix] = (),
    scale: float | None = None,
    packed: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32 over `prefix` and the new keys together.

    All parts share one softmax: their logits are joined along S, their values are not. With a
    prefix of batch 1 the N candidates of a rerank all read the same arrays.

        mask for T = S = 4, causal, the last token being padding:
            k0 k1 k2 k3
        q0   x  .  .  .
        q1   x  x  .  .
        q2   x  x  x  .
        q3   x  x  x  .   (a padding row: finite, never read)

    Args:
      q, k, v: any float dtype; N is a multiple of K.
      mask: True where the query may look.
      prefix: earlier keys and values, in any number of parts.
      scale: factor on the logits; default 1/sqrt(H).
      packed: rows hold several sequences, which `mask` keeps apart; not with `prefix`. A result is
        then the same to the bit wherever its keys stand in the row and whatever stands beside
        them, NaN included.

    Returns:
      The attended values in q's dtype.
    """
    batch, length, heads, size = q.shape
    split, kv_split = explicit_spec(q), explicit_spec(k)
    if split and kv_split and split[2] != kv_split[2]:
        # A mesh that splits the query heads but is too wide for the key heads.
        k, v = _for_each_query(k, q), _for_each_query(v, q)
        prefix = [Prefix(_for_each_query(p.k, q), _for_each_query(p.v, q), p.mask) for p in prefix]
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    factor = size**-0.5 if scale is None else scale
    q_btkgh = (q * factor).reshape(batch, length, kv_heads, groups, size)
    if packed:
        assert not prefix, "packed rows have no prefix"
        k, v = _contained(k, v)
        out = _apart(_logits(q_btkgh, k, mask), v).astype(v.dtype)
        return out.reshape(batch, length, heads, size)
    logits = [_logits(q_btkgh, p.k, p.mask) for p in prefix]
    logits.append(_logits(q_btkgh, k, mask))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(v.dtype)
    begin = weights.shape[-1] - k.shape[1]
    out = jnp.einsum("bkgts,bskh->btkgh", weights[..., begin:], v)
    for earlier in reversed(prefix):
        begin, end = begin - earlier.v.shape[1], begin
        out += _values(weights[..., begin:end], earlier.v)
    return out.reshape(batch, length, heads, size)


def _contained(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values whose NaN and infinities reach those who may look at them, and nobody else.

    A masked value has weight 0, but 0 * NaN is NaN. So such a value becomes 0 and its key NaN: a
    masked key's logit is replaced, and a visible one makes the result NaN.
    """
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)


def _apart(logits: Float[Array, "B K G T S"], v: Array) -> Float[Array, "B T K G H"]:
    """Softmax and the sum of values, with the weights summed by the same product as the values.

    A product adds key after key, so that masked ones add exact zeros and change no bit; the sum of
    a softmax is cut into vectors and blocks, and its rounding depends on where the keys stand.
    """
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(v.dtype)
    one = jnp.ones_like(v[..., :1])
    out = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        jnp.concatenate([v, one], axis=-1),
        preferred_element_type=jnp.float32,
    )
    return out[..., :-1] / out[..., -1:]


def _for_each_query(kv: Array, q: Array) -> Array:
    """[B S K H] → [B S N H], split like the heads of q: each device holds what its heads need."""
    spec = explicit_spec(kv), explicit_spec(q)
    assert spec[0] is not None and spec[1] is not None
    repeated = jnp.repeat(kv, q.shape[2] // kv.shape[2], axis=2)
    return jax.sharding.reshard(repeated, PartitionSpec(spec[0][0], None, spec[1][2], None))


def _logits(q_btkgh: Array, k: Array, mask: Array) -> Array:
    if k.shape[0] == 1 and q_btkgh.shape[0] != 1:
        logits = jnp.einsum("btkgh,skh->bkgts", q_btkgh, k[0], preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None, :, :], logits, MASKED)


def _values(weights: Array, v: Array) -> Array:
    if v.shape[0] == 1:
        return jnp.einsum("bkgts,skh->btkgh", weights, v[0])
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)
