"""Which token each slot says next, and when it has said enough.

A budget is hard, and an open think block is closed by force early enough that an answer still fits
into it. Every slot decides by its own values alone: what runs beside it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
