"""Embeddings out of decode slots: in a unified model, the embedder's sequence is the reasoner's
continued, so a slot whose sequence has ended holds the keys and values of nearly all of it.

    read by the slot    user … assistant  <think> … </think> Answer: cat
    the embedder's      user … assistant  <think> … </think> Answer: cat <|im_end|>
    run here                                                             <|im_end|>

Where the two part earlier (the budget cut a word, a stop text cut the text, or the tokenizer spells
it otherwise), the common beginning is kept and the rest is run. Nothing is written: the slots stay
as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tte_jax.engine.buckets import Buckets, Shape, longest, plan_batches
from tte_jax.engine.decode_state import DecodeState
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.inputs import ModelInput
from tte_jax.engine.programs import last_place, normalised
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache
from tte_jax.nn.linear import explicit_spec

log = logging.getLogger(__name__)

SHORT, LONG = 2, 32
"""Tokens run at once: the end of the turn, with the last token of a budget; and what follows a
forced close, whose thinking ends in the middle of a word. More than `LONG` is not embedded here."""


@dataclass(frozen=True, eq=False)
class Continuation:
    """What the embedder's sequence has beyond the tokens that a slot has read.

    Attributes:
      reused: how many leading tokens of the sequence the slot has read.
      ids: [T] int32, the others, at least one.
      position: rotary position of the first of them; they are text, so all axes are equal.
    """

    reused: int
    ids: np.ndarray
    position: int

    @property
    def tokens(self) -> int:
        """Length of the embedder's whole sequence."""
        return self.reused + len(self.ids)


@dataclass(frozen=True, eq=False)
class SlotVector:
    """An embedding made in a slot.

    Attributes:
      vector: [D] float32, L2-normalised.
      tokens, reused: length of the embedder's sequence, and how much of it the slot had read.
      compute_s: seconds of the dispatch, shared out among the sequences that ended together.
    """

    vector: np.ndarray
    tokens: int
    reused: int
    compute_s: float


def continuation(
    asked: ModelInput, generated: Sequence[int], wanted: np.ndarray
) -> Continuation | None:
    """How to go on from a slot to the embedder's sequence.

    Args:
      asked: the prompt that the slot was given.
      generated: the new tokens; the slot has read all but the last.
      wanted: [T] int32 ids of the embedder's sequence, which begins with the prompt (all of it, or
        all but some of the text after its last image).

    Returns:
      None when they part within or before an image, or have nothing in common.
    """
    read = np.concatenate([asked.ids, np.asarray(generated[:-1], np.int32)])
    most = min(len(read), len(wanted) - 1)  # at least one token is run, whose state is pooled
    differ = np.flatnonzero(read[:most] != wanted[:most])
    reused = int(differ[0]) if len(differ) else most
    media = np.flatnonzero(asked.is_media)
    if reused <= (media[-1] if len(media) else 0):
        return None
    # From the last image on, positions count with the tokens.
    position = asked.next_pos + reused - asked.tokens
    return Continuation(reused, np.asarray(wanted[reused:], np.int32), position)


def embed_slots(
    model: MultimodalLM,
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    slots: Int[Array, " R"],
    reused: Int[Array, " R"],
    ids: Int[Array, "R T"],
    position: Int[Array, " R"],
    n: Int[Array, " R"],
) -> Float[Array, "R D"]:
    """Embeddings of sequences whose beginnings lie in slots.

    Args:
      k, v: the slots' caches, left as they are.
      slots: the slot of each row. As many rows as slots are the slots in order: nothing is copied.
      reused: places of the slot that count.
      ids: the tokens after these; `n` of each row are real.
      position: rotary position of each row's first token.
    """
    rows, tokens = ids.shape
    if rows < k.shape[1]:
        k, v = _rows(k, slots), _rows(v, slots)
    steps = jnp.arange(tokens)
    hidden, _ = model.forward(
        ids,
        valid=steps[None, :] < n[:, None],
        positions=jnp.broadcast_to((position[:, None] + steps)[:, None, :], (rows, 3, tokens)),
        prefix=KVCache(k=k, v=v, length=reused),
        at=last_place(n),
    )
    return normalised(hidden[:, 0])


def _rows(cache: Array, slots: Array) -> Array:
    if (split := explicit_spec(cache)) is None:
        return cache[:, slots]
    return cache.at[:, slots].get(out_sharding=PartitionSpec(*split))


class SlotEmbedder:
    """The programs that embed slots, declared in a role's table."""

    def __init__(self, table: ExecutableTable, buckets: Buckets, state: DecodeState) -> None:
        """Args: the table, the ladder and the shapes of the decode state (`abstract_state`)."""
        self._table = table
        self._slots = buckets.slots
        # As many at once as decoding knows, since a row reads a whole cache: 1, 4 and 16 rows of
        # the built-in model take 2.7, 4.6 and 13.4 ms of one core. Few need a long rest.
        rows = sorted({1, *(n for n, _ in buckets.decode_shapes)})
        self.shapes: tuple[Shape, ...] = (*((n, SHORT) for n in rows), (1, LONG))
        lay = table.layout
        for count, tokens in self.shapes:
            table.add(
                "embed_slots",
                (count, tokens),
                embed_slots,
                state.k,
                state.v,
                lay.whole(jnp.int32, count),
                lay.whole(jnp.int32, count),
                lay.whole(jnp.int32, count, tokens),
                lay.whole(jnp.int32, count),
                lay.whole(jnp.int32, count),
                tokens=count * tokens,
            )

    def embed(
        self, state: DecodeState, wanted: Sequence[tuple[int, Continuation]]
    ) -> list[SlotVector | None]:
        """Embeds several slots; those that need few tokens in one dispatch.

        Args:
          wanted: (slot, what follows in it); no slot twice.

        Returns:
          None where too many tokens follow, or where no finite vector came out: the caller's
          embedder then says what is wrong.
        """
        out: list[SlotVector | None] = [None] * len(wanted)
        fits = [i for i, (_, c) in enumerate(wanted) if len(c.ids) <= longest(self.shapes)]
        plan = plan_batches([len(wanted[i][1].ids) for i in fits], self.shapes, what="the ECR")
        for batch in plan:
            chosen = [fits[row] for row in batch.rows]
            start = time.monotonic()
            vectors = self._run(state, batch.shape, [wanted[i] for i in chosen])
            spent = (time.monotonic() - start) / len(chosen)
            for i, vector in zip(chosen, vectors, strict=True):
                if not np.isfinite(vector).all():
                    log.warning("a slot's embedding is not finite; it is left out")
                    continue
                c = wanted[i][1]
                out[i] = SlotVector(vector, c.tokens, c.reused, spent)
        return out

    def _run(
        self, state: DecodeState, shape: Shape, wanted: Sequence[tuple[int, Continuation]]
    ) -> list[np.ndarray]:
        rows, _ = shape
        at = [slot if rows == self._slots else row for row, (slot, _) in enumerate(wanted)]
        slots, reused, position, n = (np.zeros(rows, np.int32) for _ in range(4))
        ids = np.zeros(shape, np.int32)
        for row, (slot, c) in zip(at, wanted, strict=True):
            slots[row], reused[row], position[row], n[row] = slot, c.reused, c.position, len(c.ids)
            ids[row, : len(c.ids)] = c.ids
        arguments: tuple[Any, ...] = (slots, reused, ids, position, n)
        z = np.asarray(self._table.run("embed_slots", shape, state.k, state.v, *arguments))
        return [z[row].copy() for row in at]
