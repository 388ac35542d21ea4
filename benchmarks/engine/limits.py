"""How near to the machine's own rates the programs come."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine import models
from benchmarks.engine.rounds import interleave, row, spread
from tte_jax.engine import programs
from tte_jax.engine.decode_state import DecodeState, abstract_state, empty_state
from tte_jax.engine.next_token import Stops
from tte_jax.engine.packing import most_sequences
from tte_jax.models.registry import model_config
from tte_jax.reasoner import Reasoner

DECODE = (1, 112)
UNENDING = "decode without end"
MATRIX = 1536  # three of them fit no cache, as a layer's weights and activations do not
MEMORY_BYTES = 512 * 2**20


def measure(directory: Path, *, rounds: int) -> dict[str, Any]:
    """Prefill against the rate of a large product, decode against the rate of reading memory."""
    text = model_config(directory).text
    d, head = text.hidden_size, text.vocab_size * text.hidden_size
    kv = 2 * d * text.kv_heads * text.head_dim
    others = 2 * d * text.heads * text.head_dim + 3 * d * text.intermediate_size
    rows, tokens = _largest(directory)
    # The last layer does more than keys and values for the last token of each prompt only. Score
    # and value products of causal attention count once for each pair that is looked at.
    whole = text.layers - 1
    through = tokens * (text.layers * kv + whole * others) + others + head
    pairs = whole * tokens * (tokens + 1) / 2 + tokens
    flops = rows * (2 * through + 4 * text.heads * text.head_dim * pairs)
    read = 4 * (text.layers * (kv + others) + head)

    a = jnp.asarray(np.random.default_rng(0).normal(size=(MATRIX, MATRIX)), jnp.float32)
    product = jax.jit(jnp.matmul)
    memory = jnp.ones(MEMORY_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    with Reasoner.from_pretrained(directory) as reasoner:
        reasoner.warmup()
        steps = reasoner.served.buckets.decode_steps
        prefill = _prefill(reasoner, (rows, tokens))
        decode = _decode(reasoner, steps)
        seconds = interleave(
            {
                "matmul": lambda: product(a, a).block_until_ready(),
                "memory": lambda: total(memory).block_until_ready(),
                "prefill": prefill,
                "decode": decode,
            },
            rounds,
        )
    best = {name: min(s) for name, s in seconds.items()}
    matmul_rate = 2 * MATRIX**3 / best["matmul"]
    memory_rate = MEMORY_BYTES / best["memory"]
    prefill_rate = flops / best["prefill"]
    decode_rate = read * steps / best["decode"]
    return {
        "prefill_shape": [rows, tokens],
        "decode_shape": DECODE,
        "parameters": models.parameters(directory),
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "gflops": {"matmul": round(matmul_rate / 1e9, 1), "prefill": round(prefill_rate / 1e9, 1)},
        "gb_per_s": {"memory": round(memory_rate / 1e9, 1), "decode": round(decode_rate / 1e9, 1)},
        "rows": [
            row("prefill, of the matmul rate", round(prefill_rate / matmul_rate, 3), 0.7, ""),
            row(
                "decode at batch 1, of the memory rate",
                round(decode_rate / memory_rate, 3),
                0.6,
                "",
            ),
        ],
    }


def _largest(directory: Path) -> tuple[int, int]:
    """The prefill bucket of most tokens."""
    spec = json.loads((directory / "tte.json").read_text())
    rows, tokens = max(spec["buckets"]["prefill"], key=lambda shape: shape[0] * shape[1])
    return rows, tokens


def _prefill(reasoner: Reasoner, shape: tuple[int, int]) -> Callable[[], None]:
    """Runs the program that fills slots, on prompts of the whole bucket: one to a row."""
    rows, tokens = shape
    holder = [_state(reasoner, done=True)]
    ids = np.random.default_rng(0).integers(0, 1000, (rows, tokens)).astype(np.int32)
    steps = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    positions = np.repeat(steps[:, None], 3, axis=1)
    width, slots = reasoner.served.config.feature_size, reasoner.served.buckets.slots
    per_row = most_sequences(tokens)
    ends = np.zeros((rows, per_row), np.int32)
    ends[:, 0] = tokens - 1
    cells = np.stack([np.repeat(np.arange(rows, dtype=np.int32)[:, None], tokens, axis=1), steps])
    most = min(rows * per_row, slots)
    which, slot = np.zeros(most, np.int32), np.full(most, slots, np.int32)
    which[:rows], slot[:rows] = np.arange(rows) * per_row, np.arange(rows)
    control = jax.tree.map(lambda x: np.asarray(x[:most]), _state(reasoner, done=False).control)

    def run() -> None:
        holder[0], token, *_ = reasoner.table.run(
            "prefill",
            shape,
            holder[0],
            ids,
            positions,
            np.ones((rows, tokens), np.int32),
            ends,
            np.zeros((rows * tokens, width), np.float32),
            np.full((rows, tokens), -1, np.int32),
            cells,
            which,
            slot,
            np.full(most, tokens, np.int32),
            np.full(most, tokens, np.int32),
            control,
        )
        token.block_until_ready()

    return run


def _decode(reasoner: Reasoner, steps: int) -> Callable[[], None]:
    """Runs one dispatch of one sequence that never ends: no token stops it."""
    table, served, buckets = reasoner.table, reasoner.served, reasoner.served.buckets
    slots, (rows, places) = buckets.slots, DECODE
    nothing = Stops(stop=(-1,), close_tag=(-1,), forced_close=(-1,))
    table.add(
        UNENDING,
        DECODE,
        partial(programs.decode, places=places, steps=steps, stops=nothing),
        abstract_state(
            served.model, slots=slots, length=buckets.cache_length, layout=served.layout
        ),
        served.layout.whole(jnp.int32, rows),
        served.layout.whole(jnp.bool_, rows),
        served.layout.whole(jnp.bool_, rows),
        donate=(0,),
        tokens=rows,
    )
    table.warmup()
    first = np.arange(rows, dtype=np.int32)
    alive, closed = np.ones(rows, bool), np.zeros(rows, bool)
    holder = [_state(reasoner, done=False)]

    def run() -> None:
        state, tokens, *_ = table.run(UNENDING, DECODE, holder[0], first, alive, closed)
        tokens.block_until_ready()
        holder[0] = _at_start(state, done=False)
        assert int((np.asarray(tokens) >= 0).sum()) == steps

    return run


def _state(reasoner: Reasoner, *, done: bool) -> DecodeState:
    buckets = reasoner.served.buckets
    state = empty_state(reasoner.served.model, slots=buckets.slots, length=buckets.cache_length)
    return _at_start(state, done=done)


def _at_start(state: DecodeState, *, done: bool) -> DecodeState:
    """The same caches with every slot at its 40th token and no end in sight."""
    slots = state.length.shape[0]

    def everywhere(value: int) -> jax.Array:
        # A buffer each: the programs take all of them over, and none can be given twice.
        return jnp.full((slots,), value, jnp.int32)

    control = replace(
        state.control,
        done=jnp.full((slots,), done),
        limit=everywhere(2**30),
        close_at=everywhere(2**30),
    )
    return jax.block_until_ready(
        replace(state, length=everywhere(40), next_pos=everywhere(40), control=control)
    )
