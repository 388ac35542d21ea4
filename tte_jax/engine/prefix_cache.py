"""Keys and values of what many prompts begin with: computed once, copied into the slots after.

A prompt says where such beginnings end (`PrefixEnd`): the system turn with its worked example, the
query that all rewrites of one search share. Whoever reads a marked beginning first keeps it, since
the mark says that more will come; what is not used again is the first to leave. Nothing is kept for
prompts without marks, and a beginning of less than `DISPATCH_TOKENS` tokens is not worth the copy.

A beginning is known by all that its keys and values depend on: token ids, rotary positions, and the
content of every image that stands in it, in part or as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tte_jax.engine.buckets import DISPATCH_TOKENS, Buckets
from tte_jax.engine.cache import ByteLru
from tte_jax.engine.decode_state import DecodeState
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.inputs import ModelInput
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache


class Beginning(NamedTuple):
    """The first `end` tokens of a prompt; `key` names their keys and values."""

    end: int
    key: bytes


class PrefixCache:
    """Byte-bounded; runs on the device thread.

    Args:
      state: shapes of the slots.
      merged: patches per vision token.
      max_bytes: of the device's memory; one beginning of the largest size fits in any case.

    Attributes:
      cache: `KVCache` of batch 1 by key, the last used one last.
    """

    def __init__(
        self,
        table: ExecutableTable,
        buckets: Buckets,
        state: DecodeState,
        *,
        merged: int,
        max_bytes: int,
    ) -> None:
        self._table = table
        self._merged = merged
        # A prompt goes on behind its prefix by `append`, which looks back so many places.
        self._reach = max((s for _, _, s in buckets.append), default=0)
        sizes = set(buckets.prefix) if buckets.append else set()
        self._sizes = sorted(size for size in sizes if size <= buckets.cache_length)
        layers, _, _, heads, size = state.k.shape
        place = 2 * layers * heads * size * state.k.dtype.itemsize
        self.cache: ByteLru[KVCache] = ByteLru(
            max(max_bytes, place * max(self._sizes, default=0)),
            lambda kv: kv.k.nbytes + kv.v.nbytes,
        )
        lay = table.layout
        for places in self._sizes:
            kept: Any = jax.ShapeDtypeStruct(
                (layers, 1, places, heads, size), state.k.dtype, sharding=state.k.sharding
            )
            one = lay.whole(jnp.int32)
            table.add("keep", places, partial(keep, places=places), state, one, one, tokens=0)
            length: Any = lay.whole(jnp.int32, 1)
            kv = KVCache(k=kept, v=kept, length=length)
            table.add("restore", places, restore, state, kv, one, donate=(0,), tokens=0)

    def beginnings(self, one: ModelInput) -> tuple[Beginning, ...]:
        """The marked beginnings of a prompt that can be kept, shortest first."""
        most = min(max(self._sizes, default=0), self._reach, one.tokens - 1)
        ends = [e for e in one.prefix_ends if DISPATCH_TOKENS <= e <= most]
        return tuple(Beginning(e, _key(one, e, self._merged)) for e in ends)

    def missing(self, beginnings: Sequence[Beginning], *, beyond: int) -> list[Beginning]:
        """Those longer than `beyond` tokens that are not kept."""
        return [b for b in beginnings if b.end > beyond and b.key not in self.cache]

    def restore(
        self, state: DecodeState, beginnings: Sequence[Beginning], slot: int, *, beyond: int
    ) -> tuple[DecodeState, int]:
        """Copies the longest kept beginning of more than `beyond` tokens into a slot.

        Returns the state and how many tokens the slot has now.
        """
        for end, key in reversed(beginnings):
            if end <= beyond:
                break
            if key in self.cache and (kept := self.cache.get(key)) is not None:
                places = kept.k.shape[2]
                return self._table.run("restore", places, state, kept, np.int32(slot)), end
        return state, beyond

    def keep(self, state: DecodeState, beginning: Beginning, slot: int) -> None:
        """Keeps a beginning that stands in a slot."""
        places = next(size for size in self._sizes if size >= beginning.end)
        end = np.int32(beginning.end)
        kept = self._table.run("keep", places, state, np.int32(slot), end)
        self.cache.put(beginning.key, kept)


def keep(
    model: MultimodalLM,
    state: DecodeState,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    *,
    places: int,
) -> KVCache:
    """A copy of the first `places` places of a slot, `length` of which count."""
    del model

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x[:, :, :places], slot, 1, axis=1)

    return KVCache(k=cut(state.k), v=cut(state.v), length=length[None])


def restore(
    model: MultimodalLM, state: DecodeState, kept: KVCache, slot: Int[Array, ""]
) -> DecodeState:
    """Puts what was kept into a slot; `state` is donated.

    Places behind `kept.length` get what lay behind the beginning when it was kept. Nothing reads
    them: they lie beyond the slot's length until the prompt's own tokens replace them.
    """
    del model

    def into(x: Array, new: Array) -> Array:
        zero = jnp.zeros_like(slot)
        return jax.lax.dynamic_update_slice(x, new, (zero, slot, zero, zero, zero))

    return replace(
        state,
        k=into(state.k, kept.k),
        v=into(state.v, kept.v),
        length=state.length.at[slot].set(kept.length[0]),
    )


def _key(one: ModelInput, end: int, merged: int) -> bytes:
    digest = hashlib.sha256(one.ids[:end].tobytes())
    digest.update(np.ascontiguousarray(one.positions[:, :end]).tobytes())
    for image in one.piece(0, end, merged=merged).images:
        digest.update(f"{image.key};{image.grid};".encode())
    return digest.digest()
