"""The device programs: pure functions of a model and arrays, with static shapes.

Every program takes the model first and is compiled once per bucket by
`tte_jax.engine.executables`. Rows and tokens beyond the real ones are padding: `n` says how many
tokens of each row are real, and nothing that padding holds changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tte_jax.engine.decode_state import DecodeState, cached
from tte_jax.engine.next_token import NO_TOKEN, Control, Stops, advance
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.stack import Apart, PerLayer
from tte_jax.models.text import KVCache, LayerCaches
from tte_jax.nn.linear import gathered


def encode_images(
    model: MultimodalLM,
    patches: Float[Array, "G P C"],
    *plan: Array,
) -> Float[Array, "V W"]:
    """Vision features of G packs, one row per merged patch, padding included."""
    return model.encode_images(patches, *plan)


def embed(
    model: MultimodalLM,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    ends: Int[Array, "B J"],
    vis: Float[Array, "V D"] | None,
    vis_idx: Int[Array, "B T"] | None,
) -> Float[Array, "B J D"]:
    """Hidden states of the last tokens of sequences that share rows, L2-normalised in float32.

    Args:
      segments: the sequence of its row that a token belongs to, from 1; 0 = padding.
      ends: the place of each sequence's last token; any place where there is none.
    """
    hidden, _ = model.forward(
        ids,
        valid=segments > 0,
        positions=positions,
        vis=vis,
        vis_idx=vis_idx,
        segments=segments,
        at=ends,
    )
    return normalised(hidden)


def normalised(z: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """L2-normalised in float32."""
    z = z.astype(jnp.float32)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def prefix(
    model: MultimodalLM,
    ids: Int[Array, "1 S"],
    positions: Int[Array, "1 3 S"],
    n: Int[Array, " B"],
    vis: Float[Array, "V D"] | None = None,
    vis_idx: Int[Array, "1 S"] | None = None,
) -> KVCache:
    """Keys and values of a shared prefix, computed once for all candidates."""
    _, (k, v) = model.forward(
        ids, valid=_valid(ids, n), positions=positions, vis=vis, vis_idx=vis_idx
    )
    return KVCache(k=k, v=v, length=n)


def score(
    model: MultimodalLM,
    before: KVCache,
    ids: Int[Array, "N T"],
    positions: Int[Array, "N 3 T"],
    n: Int[Array, " N"],
    vis: Float[Array, "V D"] | None = None,
    vis_idx: Int[Array, "N T"] | None = None,
    *,
    yes_id: int,
    no_id: int,
) -> Float[Array, " N"]:
    """P(yes) = sigmoid((W_yes - W_no) . h_last): two rows of the output head, not all of it."""
    hidden, _ = model.forward(
        ids,
        valid=_valid(ids, n),
        positions=positions,
        vis=vis,
        vis_idx=vis_idx,
        prefix=before,
        at=last_place(n),
    )
    yes, no = model.text.head_rows((yes_id, no_id))
    return jax.nn.sigmoid(hidden[:, 0].astype(jnp.float32) @ (yes - no))


def prefill(
    model: MultimodalLM,
    state: DecodeState,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    ends: Int[Array, "B J"],
    vis: Float[Array, "V D"] | None,
    vis_idx: Int[Array, "B T"] | None,
    cells: Int[Array, "2 B T"],
    which: Int[Array, " S"],
    slots: Int[Array, " S"],
    n: Int[Array, " S"],
    next_pos: Int[Array, " S"],
    control: Control,
    *,
    stops: Stops,
) -> tuple[DecodeState, Int[Array, " S"], Bool[Array, " S"], Bool[Array, " S"]]:
    """Reads whole prompts, of which several may share a row, and chooses each one's first token.

    Args:
      state: donated.
      segments, ends: as in `embed`.
      cells: the slot of each token and its place there; no such slot = padding, written nowhere.
      which: of each prompt, the place of its end in `ends`, counted row after row.
      slots: of each prompt; the number of slots = there is no such prompt, and nothing is written.
      n: tokens of each prompt.
      next_pos: rotary position after it.
      control: fresh control values, `generated` 0.

    Returns:
      The new state; the first token, whether the slot is done, and whether it failed, per prompt.
    """
    hidden, (k, v) = model.forward(
        ids,
        valid=segments > 0,
        positions=positions,
        vis=vis,
        vis_idx=vis_idx,
        segments=segments,
        at=ends,
    )
    last = gathered(hidden).reshape(-1, hidden.shape[-1])[which]
    token, control = advance(control, gathered(model.logits(last)), stops)
    slot, place = cells
    k, v = gathered(k, like=state.k), gathered(v, like=state.v)
    state = DecodeState(
        k=state.k.at[:, slot, place].set(cached(k, state.k), mode="drop"),
        v=state.v.at[:, slot, place].set(cached(v, state.v), mode="drop"),
        length=state.length.at[slots].set(n, mode="drop"),
        next_pos=state.next_pos.at[slots].set(next_pos, mode="drop"),
        control=jax.tree.map(
            lambda old, new: old.at[slots].set(new, mode="drop"), state.control, control
        ),
    )
    return state, token, control.done, control.failed


def append(
    model: MultimodalLM,
    state: DecodeState,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    n: Int[Array, " B"],
    vis: Float[Array, "V D"] | None,
    vis_idx: Int[Array, "B T"] | None,
    slots: Int[Array, " B"],
    start: Int[Array, " B"],
    last: Bool[Array, " B"],
    next_pos: Int[Array, " B"],
    control: Control,
    *,
    places: int,
    stops: Stops,
) -> tuple[DecodeState, Int[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """Reads the next `n` tokens of prompts whose first `start` tokens are in their slots.

    Args:
      state: donated.
      slots: the slot of each row; the number of slots = a padding row, which is written nowhere.
      start: at most `places`.
      last: the prompt ends here, and its first token is chosen; else the slot stays done, so that
        decoding in between leaves it alone.
      next_pos, control: as in `prefill`; those of the last piece count.

    Returns: as `prefill`; `failed` of every piece, the token of the last ones.
    """
    before = KVCache(
        k=state.k[:, :, :places].at[:, slots].get(mode="clip"),
        v=state.v[:, :, :places].at[:, slots].get(mode="clip"),
        length=start,
    )
    valid = _valid(ids, n)
    hidden, (k, v) = model.forward(
        ids,
        valid=valid,
        positions=positions,
        vis=vis,
        vis_idx=vis_idx,
        prefix=before,
        at=last_place(n),
    )
    token, control = advance(control, gathered(model.logits(hidden[:, 0])), stops)
    control = replace(control, done=control.done | ~last)
    # Padding goes nowhere: what lies behind a prompt may be another sequence's past, never this
    # one's future.
    row, whole = slots[:, None], state.k.shape[2]
    place = jnp.where(valid, start[:, None] + jnp.arange(ids.shape[1])[None, :], whole)
    k, v = gathered(k, like=state.k), gathered(v, like=state.v)
    state = DecodeState(
        k=state.k.at[:, row, place].set(cached(k, state.k), mode="drop"),
        v=state.v.at[:, row, place].set(cached(v, state.v), mode="drop"),
        length=state.length.at[slots].set(start + n, mode="drop"),
        next_pos=state.next_pos.at[slots].set(next_pos, mode="drop"),
        control=jax.tree.map(
            lambda old, new: old.at[slots].set(new, mode="drop"), state.control, control
        ),
    )
    return state, token, control.done, control.failed


def decode(
    model: MultimodalLM,
    state: DecodeState,
    slots: Int[Array, " B"],
    alive: Bool[Array, " B"],
    closed: Bool[Array, " B"],
    *,
    places: int,
    steps: int,
    stops: Stops,
) -> tuple[DecodeState, Int[Array, "k B"], Int[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """`steps` tokens for some of the slots, over the first `places` places of their caches.

    Few slots should not pay for all, nor short sequences for long ones: their part of the caches is
    taken out once. The steps only read it, and keep what they add beside it; that is written to the
    slots at the end. (A cache that is read and written in every step was copied in every step.)

        attended to at step i     | places of the slot | steps 0 .. i-1 | the token itself |

    Where all slots are done, the rest of the steps is not run.

    Args:
      state: donated.
      slots: the slot of each row, none twice; as many rows as slots are the slots in order.
      alive: False stops a row: its caller has gone, or it is there to fill the shape.
      closed: True where the host saw in the text that thinking is over (a tokenizer may spell
        the tag in other tokens than `close_tag`).
      places: at least the length of every live sequence among them.

    Returns:
      The new state; tokens, `NO_TOKEN` where a row was done already; and after the last step:
      `forced`, `done`, `failed`.
    """
    rows, whole = len(slots), state.k.shape[1:3]
    steps = min(steps, whole[1])  # no sequence has room for more
    all_slots = rows == whole[0]

    def taken(x: Array) -> Array:
        return x if all_slots else x[slots]

    def part(cache: Array) -> Array:
        cache = cache[:, :, :places]
        return cache if all_slots else cache.at[:, slots].get(mode="clip")

    length, next_pos = taken(state.length), taken(state.next_pos)
    before = _readable(model, part(state.k), part(state.v), length)
    c = jax.tree.map(taken, state.control)
    c = replace(c, done=c.done | ~alive, closed=c.closed | closed)

    def step(carry: tuple[Array, Control, Array, Array, Array]) -> tuple[Any, ...]:
        i, c, new_k, new_v, tokens = carry
        # Every row that is not done has gone i steps; of the others nothing is kept.
        hidden, (k, v) = model.forward(
            c.last_token[:, None],
            valid=jnp.ones((rows, 1), bool),
            positions=jnp.broadcast_to((next_pos + i)[:, None, None], (rows, 3, 1)),
            prefix=before(),
            recent=KVCache(k=new_k, v=new_v, length=jnp.full((rows,), i)),
        )
        token, after = advance(c, gathered(model.logits(hidden[:, 0])), stops)
        new_k = new_k.at[:, :, i].set(cached(k[:, :, 0], state.k))
        new_v = new_v.at[:, :, i].set(cached(v[:, :, 0], state.v))
        return i + 1, after, new_k, new_v, tokens.at[i].set(jnp.where(c.done, NO_TOKEN, token))

    def wanted(carry: tuple[Array, Control, Array, Array, Array]) -> Array:
        return (carry[0] < steps) & ~carry[1].done.all()

    # Of the caches' kind, so that on a mesh they lie as these do.
    none_k = jnp.zeros_like(state.k[:, :rows, :steps])
    none_v = jnp.zeros_like(state.v[:, :rows, :steps])
    nothing = jnp.full((steps, rows), NO_TOKEN, jnp.int32)
    _, c, new_k, new_v, tokens = jax.lax.while_loop(
        wanted, step, (jnp.int32(0), c, none_k, none_v, nothing)
    )
    count = (tokens != NO_TOKEN).sum(axis=0, dtype=jnp.int32)
    step_of = jnp.arange(steps)[None, :]
    place = jnp.where(step_of < count[:, None], length[:, None] + step_of, whole[1])
    state = DecodeState(
        k=state.k.at[:, slots[:, None], place].set(new_k, mode="drop"),
        v=state.v.at[:, slots[:, None], place].set(new_v, mode="drop"),
        length=state.length.at[slots].add(count),
        next_pos=state.next_pos.at[slots].add(count),
        control=jax.tree.map(lambda old, new: old.at[slots].set(new), state.control, c),
    )
    return state, tokens, c.forced, c.done, c.failed


def _readable(
    model: MultimodalLM, k: Array, v: Array, length: Array
) -> Callable[[], KVCache | LayerCaches]:
    """A cache that many steps read, made outside of their loop, and how a step gets at it.

    On a CPU products read keys as [B K S H] and values as [B K H S], each layer's from an array of
    its own. A cache that lies otherwise is copied into that form in every step.
    """
    if not isinstance(model.text.layers, Apart):
        return lambda: KVCache(k=k, v=v, length=length)
    # The barrier keeps the copies here.
    keys = jax.lax.optimization_barrier([x.transpose(0, 2, 1, 3) for x in k])
    values = jax.lax.optimization_barrier([x.transpose(0, 2, 3, 1) for x in v])
    return lambda: LayerCaches(
        k=PerLayer(x.transpose(0, 2, 1, 3) for x in keys),
        v=PerLayer(x.transpose(0, 3, 1, 2) for x in values),
        length=length,
    )


def last_place(n: Int[Array, " B"]) -> Int[Array, "B 1"]:
    """Where the last of each row's `n` tokens stands; 0 for a row of padding."""
    return jnp.maximum(n - 1, 0)[:, None]


def _valid(ids: Array, n: Array) -> Array:
    return jnp.arange(ids.shape[1])[None, :] < n[:, None]
