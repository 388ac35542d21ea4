"""Products with weights and look-ups in tables: the one seam through which models read matrices.

Four things are decided here so that model code needs not know them. A weight may be int8 with
scales (`Int8Weight`). It may have an adapter that is being trained (`AdaptedWeight`). It may lie
with its outputs first (`TurnedWeight`). And on a mesh with explicit axis types every product has a
sharding in its type, which JAX refuses to guess where both sides of a sum are split; `project`
derives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

TENSOR_AXIS = "tp"
"""The mesh axis that splits the computation; the others split the batch or only the storage."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A weight as int8 with one scale for each output channel: w = q * scale.

    Attributes:
      q: int8, the weight's shape.
      scale: float32, the same rank, 1 in the dimensions that are summed over.
    """

    q: Array
    scale: Array

    def __getitem__(self, index: Any) -> Any:
        """Float values of a part; `[...]`, with which models read their parameters, is itself."""
        if index is ...:
            return self
        scale = jnp.broadcast_to(self.scale, self.q.shape)
        return self.q[index].astype(jnp.float32) * scale[index]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with a LoRA or DoRA adapter beside it: what training sees (serving merges).

        LoRA   y = x W + s dropout(x) A B
        DoRA   y = (m / ‖W + s A B‖) (x W + s dropout(x) A B)   the norm, of each output, is a
                                                                 constant to the gradient

    Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353, section 4.3.

    Attributes:
      w: the weight [inputs..., outputs...], maybe behind a stacked L, as all others here.
      a: [inputs..., R]; b: [R, outputs...]; rank R.
      magnitude: [outputs...] of DoRA; None = LoRA.
      key: of the dropout, one for each stacked layer; None = no dropout.
      scale: s; rate: share of x that is dropped on the way into A.
    """

    w: Array
    a: Array
    b: Array
    magnitude: Array | None = None
    key: Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    rate: float = field(default=0.0, metadata={"static": True})

    def __getitem__(self, index: Any) -> AdaptedWeight:
        """`[...]`, with which models read their parameters, is itself; there are no others."""
        if index is not ...:
            raise TypeError("rows of a weight with an adapter cannot be read; merge the adapter")
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TurnedWeight:
    """A weight with its outputs first, for products of few rows on a CPU.

    XLA's product there copies its second operand into tiles before it begins. Of few rows that copy
    is most of the work when the weight is second; here it is the first, and the rows are copied.

    Attributes:
      w: [outputs..., inputs...].
    """

    w: Array

    def __getitem__(self, index: Any) -> TurnedWeight:
        """`[...]`, with which models read their parameters, is itself; there are no others."""
        if index is not ...:
            raise TypeError("a turned weight is for products alone")
        return self


Weight = Array | Int8Weight | AdaptedWeight | TurnedWeight


@partial(jax.jit, static_argnames="inputs")
def quantise(w: Array, inputs: tuple[int, ...]) -> Int8Weight:
    """Symmetric int8 by the largest value of each output channel, rounded to the nearest.

    No value moves by more than half a scale. On a mesh the integers lie as the weight does.

    Args:
      inputs: the dimensions of the weight that its product sums over.
    """
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=inputs, keepdims=True) / 127
    q = jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    if (split := explicit_spec(scale)) is not None:
        # Scales meet the product, which is split over "tp" alone.
        spec = PartitionSpec(*(axis if axis == TENSOR_AXIS else None for axis in split))
        scale = jax.sharding.reshard(scale, NamedSharding(jax.typeof(scale).sharding.mesh, spec))
    return Int8Weight(q, scale)


def project(subscripts: str, x: Array, w: Weight, *, dtype: Any = None) -> Array:
    """`einsum(subscripts, x, w)` of activations and a weight.

    On an explicit mesh: what the activations keep stays sharded as it is, an output dimension of
    the weight stays split over "tp", and a sum over a split dimension is completed (all-reduce).
    Storage sharding (FSDP) never reaches the activations: such weights are gathered for the
    product.

    Args:
      subscripts: two operands; no letter twice in one of them.
      w: `Int8Weight`: its scales are applied to the product. `AdaptedWeight`: the adapter's
        product is added in x's dtype. `TurnedWeight`: for no mesh.
      dtype: of the result; None = x's.
    """
    if isinstance(w, Int8Weight):
        product = _einsum(subscripts, x, w.q.astype(x.dtype), jnp.float32)
        return (product * _output_scale(subscripts, w)).astype(dtype or x.dtype)
    if isinstance(w, AdaptedWeight):
        return _adapted(subscripts, x, w, dtype)
    if isinstance(w, TurnedWeight):
        return _turned(subscripts, x, w.w, dtype)
    return _einsum(subscripts, x, w, dtype)


def lookup(table: Array, rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Rows of a table [V D], sharded as `rows`; a row beyond the table is NaN."""
    sharding = None
    if explicit_spec(table) is not None:
        spec = explicit_spec(rows) or (None,) * rows.ndim  # constants belong to no mesh
        sharding = PartitionSpec(*spec, None)
    return table.at[rows].get(mode="fill", out_sharding=sharding)


def columns(w: Array | Int8Weight | TurnedWeight, which: Int[Array, " C"]) -> Float[Array, "D C"]:
    """A few columns of a matrix in float32, on every device of a mesh."""
    if isinstance(w, Int8Weight):
        return _columns(w.q, which) * _columns(w.scale, which)
    if isinstance(w, TurnedWeight):
        return lookup(w.w, which).astype(jnp.float32).T
    return _columns(w, which)


def gathered(x: Array, *, like: Array | None = None) -> Array:
    """x with every part on every device, or split as `like` is; x itself without a mesh."""
    if explicit_spec(x) is None:
        return x
    spec = () if like is None else explicit_spec(like) or ()
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def fold(x: Array, *shape: int) -> Array:
    """`x.reshape(shape)` that changes trailing dimensions only; the first stays split as it is.

    JAX refuses to guess where the shards of a reshaped dimension go. Here they stay: the new first
    dimension is the old one, or the old one times what was folded into it.
    """
    spec = explicit_spec(x)
    if spec is None or not any(spec):
        return x.reshape(shape)
    split = PartitionSpec(spec[0], *(None for _ in shape[1:]))
    return jnp.reshape(x, shape, out_sharding=split)


def explicit_spec(x: Array) -> tuple[Any, ...] | None:
    """The sharding in x's type, one entry a dimension; None unless on an explicit mesh."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = tuple(sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _columns(w: Array, which: Array) -> Array:
    whole = None if explicit_spec(w) is None else PartitionSpec(None, None)
    return w.at[:, which].get(out_sharding=whole).astype(jnp.float32)


def _einsum(subscripts: str, x: Array, w: Array, dtype: Any) -> Array:
    """The product, as one of two matrices where dimensions can be joined.

    So is the gradient of a weight then; of more dimensions XLA turns both operands over in memory
    first, on a CPU.
    """
    split = _product(subscripts, x, w)
    operands, out = subscripts.split("->")
    letters_x, letters_w = operands.split(",")
    inputs = "".join(n for n in letters_w if n not in out)
    kept, outputs = len(letters_x) - len(inputs), len(inputs)  # where each operand is parted
    if kept and letters_x[kept:] + out == inputs + letters_x[:kept] + letters_w[outputs:]:
        rows, columns = _matrix(x, kept), _matrix(w, outputs)
        if rows is not None and columns is not None:
            shape = (*x.shape[:kept], *w.shape[outputs:])
            flat = None if split is None else PartitionSpec(split[0], split[kept])
            product = jnp.einsum(
                "rz,zc->rc", rows, columns, preferred_element_type=dtype, out_sharding=flat
            )
            return jax.lax.reshape(product, shape, out_sharding=split)
    return jnp.einsum(subscripts, x, w, preferred_element_type=dtype, out_sharding=split)


def _matrix(x: Array, kept: int) -> Array | None:
    """x with its first `kept` dimensions as one and the others as one.

    None where a mesh splits another dimension than the first of each.
    """
    shape = math.prod(x.shape[:kept]), math.prod(x.shape[kept:])
    spec = explicit_spec(x)
    if spec is None:
        return x.reshape(shape)
    if any(axis is not None for axis in (*spec[1:kept], *spec[kept + 1 :])):
        return None
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(spec[0], spec[kept]))


def _product(subscripts: str, x: Array, w: Array) -> PartitionSpec | None:
    of_x, of_w = explicit_spec(x), explicit_spec(w)
    if of_x is None or of_w is None:
        return None
    operands, out = subscripts.split("->")
    letters_x, letters_w = operands.split(",")
    kept = dict(zip(letters_x, of_x, strict=True))
    split = {n: a for n, a in zip(letters_w, of_w, strict=True) if a == TENSOR_AXIS}
    return PartitionSpec(*(kept[n] if n in kept else split.get(n) for n in out))


def _adapted(subscripts: str, x: Array, w: AdaptedWeight, dtype: Any) -> Array:
    operands, out = subscripts.split("->")
    letters_x, letters_w = operands.split(",")
    inputs = "".join(n for n in letters_w if n not in out)
    outputs = "".join(n for n in letters_w if n in out)
    kept = "".join(n for n in letters_x if n in out)
    assert letters_w == inputs + outputs and out == kept + outputs, subscripts
    rank = next(n for n in "rzy" if n not in letters_x + letters_w)
    a, b = w.a.astype(x.dtype), w.b.astype(x.dtype)
    seen = x
    if w.key is not None and w.rate > 0:
        keep = jax.random.bernoulli(w.key, 1 - w.rate, x.shape, **_like(x))
        seen = jnp.where(keep, x / (1 - w.rate), 0).astype(x.dtype)
    inner = _einsum(f"{letters_x},{inputs}{rank}->{kept}{rank}", seen, a, None)
    added = _einsum(f"{kept}{rank},{rank}{outputs}->{out}", inner, b, dtype)
    product = _einsum(subscripts, x, w.w, dtype) + w.scale * added
    if w.magnitude is None:
        return product
    change = jnp.einsum(f"{inputs}{rank},{rank}{outputs}->{letters_w}", w.a, w.b)
    merged = jax.lax.stop_gradient(w.w.astype(jnp.float32) + w.scale * change)
    norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=tuple(range(len(inputs)))))
    return product * split_like(w.magnitude / norm, product).astype(product.dtype)


def _turned(subscripts: str, x: Array, w: Array, dtype: Any) -> Array:
    operands, out = subscripts.split("->")
    letters_x, letters_w = operands.split(",")
    inputs = "".join(n for n in letters_w if n not in out)
    outputs = "".join(n for n in letters_w if n in out)
    kept = "".join(n for n in letters_x if n in out)
    assert letters_w == inputs + outputs and out == kept + outputs, subscripts
    assert letters_x == kept + inputs and "z" not in operands, subscripts
    # Of two summed dimensions one is made: XLA copies such a weight into another order of them.
    x = x.reshape(*x.shape[: len(kept)], -1)
    w = w.reshape(*w.shape[: len(outputs)], -1)
    product = jnp.einsum(f"{outputs}z,{kept}z->{outputs}{kept}", w, x, preferred_element_type=dtype)
    return jnp.moveaxis(product, range(len(outputs)), range(-len(outputs), 0))


def _like(x: Array) -> dict[str, Any]:
    """Where random values for x go: with x."""
    spec = explicit_spec(x)
    if spec is None:
        return {}
    return {"out_sharding": NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))}


def split_like(vector: Array, product: Array) -> Array:
    """`vector`, a value for each output, split as the last dimensions of a product are."""
    spec = explicit_spec(product)
    if spec is None or explicit_spec(vector) is None:
        return vector
    return jax.sharding.reshard(vector, PartitionSpec(*spec[-vector.ndim :]))


def _output_scale(subscripts: str, w: Int8Weight) -> Array:
    """The scales in the order of the result's dimensions, ready to be broadcast."""
    operands, out = subscripts.split("->")
    letters = operands.split(",")[1]
    summed = tuple(i for i, n in enumerate(letters) if n not in out)
    kept = "".join(n for n in letters if n in out)
    assert out.endswith(kept), subscripts
    return w.scale.squeeze(summed)
