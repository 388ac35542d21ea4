"""The device programs: pure functions of a model and arrays, with static shapes.

Every program takes the model first and is compiled once per bucket by
`tte_jax.engine.executables`. Rows and tokens beyond the real ones are padding: `n` says how many
tokens of each row are real, and nothing that padding holds changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tte_jax.engine.layout import ONE_DEVICE, Layout
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache
from tte_jax.nn.linear import explicit_spec, gathered

NO_TOKEN = -1

Leaf = Any
"""An array of the device, or a NumPy one on its way there."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Control:
    """What decides each slot's next token. All fields are [B].

    Attributes:
      last_token: int32, the token to be read next.
      generated: int32, new tokens so far, forced ones included.
      limit: int32, the budget; never exceeded.
      close_at: int32, value of `generated` at which an open think block is closed by force.
      forced: int32, how many tokens of the forced close were written; -1 = not forcing.
      matched: int32, how many tokens of the close tag the newest tokens match.
      closed: bool, the think block has been closed, by the model or by force.
      done: bool, stopped or empty.
      failed: bool, the logits were not finite; the slot is done.
      temperature: float32, 0 = greedy.
      top_p: float32, nucleus; 1 = all tokens.
      seed: uint32; token i of a slot depends on (seed, i) alone, not on its neighbours.
    """

    last_token: Leaf
    generated: Leaf
    limit: Leaf
    close_at: Leaf
    forced: Leaf
    matched: Leaf
    closed: Leaf
    done: Leaf
    failed: Leaf
    temperature: Leaf
    top_p: Leaf
    seed: Leaf


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


@dataclass(frozen=True)
class Stops:
    """Token ids the decode loop knows by value.

    Attributes:
      stop: ids that end a sequence.
      close_tag: ids of `</think>`, the sign that the model closed its thinking.
      forced_close: ids written by force at the limit: the tag and the answer's label.
    """

    stop: tuple[int, ...]
    close_tag: tuple[int, ...]
    forced_close: tuple[int, ...]


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


def pooled(hidden: Float[Array, "B T D"], n: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The embedding of each row of `n` real tokens: its last one, L2-normalised in float32."""
    return normalised(_last(hidden, n))


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
        ids, valid=_valid(ids, n), positions=positions, vis=vis, vis_idx=vis_idx, prefix=before
    )
    yes, no = model.text.head_rows((yes_id, no_id))
    return jax.nn.sigmoid(_last(hidden, n).astype(jnp.float32) @ (yes - no))


def prefill(
    model: MultimodalLM,
    state: DecodeState,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    n: Int[Array, " B"],
    vis: Float[Array, "V D"] | None,
    vis_idx: Int[Array, "B T"] | None,
    slots: Int[Array, " B"],
    next_pos: Int[Array, " B"],
    control: Control,
    *,
    stops: Stops,
) -> tuple[DecodeState, Int[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """Reads prompts into slots and chooses each one's first token.

    Args:
      state: donated.
      slots: the slot of each row; the number of slots = a padding row, which is written nowhere.
      next_pos: rotary position after the prompt.
      control: fresh control values, `generated` 0.

    Returns:
      The new state; the first token, whether the slot is done, and whether it failed, per row.
    """
    hidden, (k, v) = model.forward(
        ids, valid=_valid(ids, n), positions=positions, vis=vis, vis_idx=vis_idx
    )
    token, control = advance(control, gathered(model.logits(_last(hidden, n))), stops)
    tokens = ids.shape[1]
    k, v = gathered(k, like=state.k), gathered(v, like=state.v)
    state = DecodeState(
        k=state.k.at[:, slots, :tokens].set(_cached(k, state.k), mode="drop"),
        v=state.v.at[:, slots, :tokens].set(_cached(v, state.v), mode="drop"),
        length=state.length.at[slots].set(gathered(n), mode="drop"),
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
      slots: as in `prefill`.
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
        ids, valid=valid, positions=positions, vis=vis, vis_idx=vis_idx, prefix=before
    )
    token, control = advance(control, gathered(model.logits(_last(hidden, n))), stops)
    control = replace(control, done=control.done | ~last)
    # Padding goes nowhere: what lies behind a prompt may be another sequence's past, never this
    # one's future.
    row, whole = slots[:, None], state.k.shape[2]
    place = jnp.where(valid, start[:, None] + jnp.arange(ids.shape[1])[None, :], whole)
    k, v = gathered(k, like=state.k), gathered(v, like=state.v)
    state = DecodeState(
        k=state.k.at[:, row, place].set(_cached(k, state.k), mode="drop"),
        v=state.v.at[:, row, place].set(_cached(v, state.v), mode="drop"),
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
    alive: Bool[Array, " B"],
    closed: Bool[Array, " B"],
    *,
    slots: int,
    places: int,
    steps: int,
    stops: Stops,
) -> tuple[DecodeState, Int[Array, "k B"], Int[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """`steps` tokens for the first `slots` slots, over the first `places` places of their caches.

    Reading the caches is a large part of a step, so short sequences should not pay for long ones.
    Where all slots are done, the rest of the steps is not run.

    Args:
      state: donated.
      alive: False stops a slot: its caller has gone.
      closed: True where the host saw in the text that thinking is over (a tokenizer may spell
        the tag in other tokens than `close_tag`).
      places: at least the length of every live sequence among them after these steps.

    Returns:
      The new state; tokens, `NO_TOKEN` where a slot was done already; and after the last step:
      `forced`, `done`, `failed`.
    """
    part = _view(state, slots, places)
    part = replace(
        part,
        control=replace(
            part.control,
            done=part.control.done | ~alive[:slots],
            closed=part.control.closed | closed[:slots],
        ),
    )

    def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        i, s, tokens = carry
        c = s.control
        rows = jnp.arange(slots)
        hidden, (k, v) = model.forward(
            c.last_token[:, None],
            valid=jnp.ones((slots, 1), bool),
            positions=jnp.broadcast_to(s.next_pos[:, None, None], (slots, 3, 1)),
            prefix=KVCache(k=s.k, v=s.v, length=s.length),
        )
        token, after = advance(c, gathered(model.logits(hidden[:, 0])), stops)
        # A done slot keeps its length, so what is written for it lies beyond its end.
        grown = jnp.where(c.done, 0, 1)
        s = DecodeState(
            k=s.k.at[:, rows, s.length].set(_cached(k[:, :, 0], s.k), mode="drop"),
            v=s.v.at[:, rows, s.length].set(_cached(v[:, :, 0], s.v), mode="drop"),
            length=s.length + grown,
            next_pos=s.next_pos + grown,
            control=after,
        )
        return i + 1, s, tokens.at[i].set(jnp.where(c.done, NO_TOKEN, token))

    def wanted(carry: tuple[Array, DecodeState, Array]) -> Array:
        return (carry[0] < steps) & ~carry[1].control.done.all()

    nothing = jnp.full((steps, slots), NO_TOKEN, jnp.int32)
    _, part, tokens = jax.lax.while_loop(wanted, step, (jnp.int32(0), part, nothing))
    c = part.control
    return _put_back(state, part), tokens, c.forced, c.done, c.failed


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


def _cached(new: Array, cache: Array) -> Array:
    """Keys or values as a slot keeps them: never NaN or infinite.

    The sequence that made such numbers fails by its logits in the same dispatch. Left in the slot
    they would reach the next one there: a masked place has weight 0, and 0 * NaN is NaN.
    """
    return jnp.where(jnp.isfinite(new), new, 0).astype(cache.dtype)


def _valid(ids: Array, n: Array) -> Array:
    return jnp.arange(ids.shape[1])[None, :] < n[:, None]


def _last(hidden: Array, n: Array) -> Array:
    rows, last = jnp.arange(hidden.shape[0]), jnp.maximum(n - 1, 0)
    if (split := explicit_spec(hidden)) is None:
        return hidden[rows, last]
    return hidden.at[rows, last].get(out_sharding=PartitionSpec(split[0], None))


def _view(state: DecodeState, slots: int, places: int) -> DecodeState:
    if state.k.shape[1:3] == (slots, places):
        return state
    return DecodeState(
        k=state.k[:, :slots, :places],
        v=state.v[:, :slots, :places],
        length=state.length[:slots],
        next_pos=state.next_pos[:slots],
        control=jax.tree.map(lambda x: x[:slots], state.control),
    )


def _put_back(state: DecodeState, part: DecodeState) -> DecodeState:
    if part.k.shape == state.k.shape:
        return part
    slots, places = part.k.shape[1:3]
    return DecodeState(
        k=state.k.at[:, :slots, :places].set(part.k),
        v=state.v.at[:, :slots, :places].set(part.v),
        length=state.length.at[:slots].set(part.length),
        next_pos=state.next_pos.at[:slots].set(part.next_pos),
        control=jax.tree.map(lambda x, y: x.at[:slots].set(y), state.control, part.control),
    )


def advance(c: Control, logits: Float[Array, "B V"], stops: Stops) -> tuple[Array, Control]:
    """The next token of each slot and the control values after it; done slots stay as they are.

    generated   0 .. close_at-1     thinking: the model's own tokens
                close_at ..         `</think>\\nAnswer:` unless the model closed it itself
                .. limit            the answer; done at a stop token or at the limit
    """
    token = _choose(c, logits)
    length = len(stops.forced_close)
    begin = ~c.closed & (c.forced < 0) & (c.generated >= c.close_at)
    forced = jnp.where(begin, 0, c.forced)
    forcing = (forced >= 0) & (forced < length)
    script = jnp.asarray(stops.forced_close, jnp.int32)
    token = jnp.where(forcing, script[jnp.clip(forced, 0, length - 1)], token)
    forced = jnp.where(forcing, forced + 1, forced)

    tag = jnp.asarray(stops.close_tag, jnp.int32)
    matched = jnp.where(
        token == tag[jnp.clip(c.matched, 0, len(stops.close_tag) - 1)],
        c.matched + 1,
        (token == tag[0]).astype(jnp.int32),
    )
    closed = c.closed | (matched == len(stops.close_tag)) | (forced >= 0)
    matched = jnp.where(closed, 0, matched)

    generated = c.generated + 1
    stopped = jnp.zeros_like(c.done)
    for stop in stops.stop:
        stopped |= token == stop
    failed = ~jnp.isfinite(logits).all(axis=-1)
    after = Control(
        last_token=token,
        generated=generated,
        limit=c.limit,
        close_at=c.close_at,
        forced=forced,
        matched=matched,
        closed=closed,
        done=(stopped & ~forcing) | (generated >= c.limit) | failed,
        failed=failed,
        temperature=c.temperature,
        top_p=c.top_p,
        seed=c.seed,
    )
    return token, jax.tree.map(lambda old, new: jnp.where(c.done, old, new), c, after)


def _choose(c: Control, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample() -> Array:
        # Work over the whole vocabulary; only when somebody samples.
        scaled = logits / jnp.maximum(c.temperature, 1e-6)[:, None]
        mass = jax.nn.softmax(scaled, axis=-1)

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            enough = jnp.where(mass >= middle[:, None], mass, 0).sum(axis=-1) >= c.top_p
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        # The nucleus is what has at least a certain probability. Bisection finds that probability
        # to the last bits of float32; sorting 150,000 logits would take far longer.
        low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(c.top_p), mass.max(axis=-1)))
        low = jnp.where(c.top_p >= 1.0, 0.0, low)
        nucleus = jnp.where(mass >= low[:, None], scaled, -jnp.inf)

        def draw(seed: Array, count: Array, row: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), row)

        drawn = jax.vmap(draw)(c.seed, c.generated, nucleus).astype(jnp.int32)
        return jnp.where(c.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any((c.temperature > 0) & ~c.done), sample, lambda: greedy)
