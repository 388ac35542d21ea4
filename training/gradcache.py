"""GradCache: the exact gradient of a loss over all embeddings, in the memory of one sub-batch.

A contrastive loss couples every sequence of the global batch, so accumulating gradients of
sub-batches is another loss (fewer negatives). Instead (Gao et al. 2021, arXiv:2101.06983):

    1  forward    every sub-batch is encoded, without a tape; its vectors go into one buffer
    2  loss       value and gradient with respect to the buffer
    3  backward   every sub-batch is encoded again, with a tape, and pulled back from its rows of
                  that gradient; parameter gradients are summed

Dropout is the same in 1 and 3, since both passes get the sub-batch's own key. The three are
compiled programs of fixed shapes: memory of 1 and 3 does not depend on the global batch, and
sub-batches may differ in shape (`training.batches` packs each length into its own). Sums are
float32.

`direct` is the same gradient in one program: faster where everything fits, since nothing is encoded
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from training.contrastive_loss import BATCH_AXES

Encode = Callable[[Any, Any, Any, Array | None], Array]
"""(trained, frozen, sub-batch, key) → [R S D] float32: S vectors of each of R rows. The sub-batch
has `dest` [R S] int32: where each vector goes among those of its shard, or beyond them for none."""

Loss = Callable[[Array, Any, Any], tuple[Array, Any]]
"""(buffer [shards * N, D], trained, labels) → (loss, metrics)."""


class GradCache:
    """`value_and_grad` of `loss(encode(every sub-batch))`.

    Args:
      encode: must be a pure function of its arguments.
      loss: `trained` is passed on, for a learned temperature.
      mesh: of `tte_jax.sharding`; None = one device.
    """

    def __init__(self, encode: Encode, loss: Loss, mesh: Mesh | None = None) -> None:
        self._encode, self._loss, self.mesh = encode, loss, mesh
        self.forward = jax.jit(self._forward, donate_argnums=(4,))
        self.loss = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), donate_argnums=(0,)
        )
        self.backward = jax.jit(self._backward, donate_argnums=(5,))
        self.direct = jax.jit(
            jax.value_and_grad(self._direct, has_aux=True), static_argnames=("rows", "size")
        )

    def __call__(
        self,
        trained: Any,
        frozen: Any,
        batches: Sequence[Any],
        keys: Sequence[Array | None],
        labels: Any,
        *,
        rows: int,
        size: int,
    ) -> tuple[tuple[Array, Any], Any]:
        """((loss, metrics), gradient of `trained` in float32).

        Args:
          batches: the sub-batches; together they fill every place of the buffer once.
          keys: of each one's dropout.
          rows: vectors of the whole buffer; size: D.
        """
        buffer = self.empty(rows, size)
        for batch, key in zip(batches, keys, strict=True):
            buffer = self.forward(trained, frozen, batch, key, buffer)
        (loss, metrics), (d_buffer, grads) = self.loss(buffer, trained, labels)
        for batch, key in zip(batches, keys, strict=True):
            grads = self.backward(trained, frozen, batch, key, d_buffer, grads)
        return (loss, metrics), grads

    def empty(self, rows: int, size: int) -> Float[Array, "N D"]:
        """A buffer of zeros, split over the batch axes."""
        if self.mesh is None:
            return jnp.zeros((rows, size), jnp.float32)
        where = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        return jax.jit(partial(jnp.zeros, (rows, size), jnp.float32), out_shardings=where)()

    def _forward(
        self, trained: Any, frozen: Any, batch: Any, key: Array | None, buffer: Array
    ) -> Array:
        return self._put(buffer, self._encode(trained, frozen, batch, key), batch.dest)

    def _backward(
        self,
        trained: Any,
        frozen: Any,
        batch: Any,
        key: Array | None,
        d_buffer: Array,
        grads: Any,
    ) -> Any:
        vectors, pull = jax.vjp(lambda t: self._encode(t, frozen, batch, key), trained)
        (more,) = pull(self._take(d_buffer, batch.dest).astype(vectors.dtype))
        return jax.tree.map(jnp.add, grads, more)

    def _direct(
        self,
        trained: Any,
        frozen: Any,
        batches: Sequence[Any],
        keys: Sequence[Array | None],
        labels: Any,
        *,
        rows: int,
        size: int,
    ) -> tuple[Array, Any]:
        buffer = jnp.zeros((rows, size), jnp.float32)
        if self.mesh is not None:
            buffer = jax.sharding.reshard(buffer, PartitionSpec(BATCH_AXES))
        for batch, key in zip(batches, keys, strict=True):
            buffer = self._put(buffer, self._encode(trained, frozen, batch, key), batch.dest)
        return self._loss(buffer, trained, labels)

    def _put(self, buffer: Array, vectors: Array, dest: Array) -> Array:
        return self._local(_put, buffer, vectors, dest)

    def _take(self, buffer: Array, dest: Array) -> Array:
        return self._local(_take, buffer, dest)

    def _local(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Each shard for itself: a sequence's vector never leaves the device that wanted it."""
        if self.mesh is None:
            return function(*arrays)
        spec = PartitionSpec(BATCH_AXES)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=(spec,) * len(arrays), out_specs=spec
        )(*arrays)


def _put(buffer: Array, vectors: Array, dest: Array) -> Array:
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(buffer.dtype)
    return buffer.at[dest.reshape(-1)].set(flat, mode="drop", unique_indices=False)


def _take(buffer: Array, dest: Array) -> Array:
    return buffer.at[dest].get(mode="fill", fill_value=0)
