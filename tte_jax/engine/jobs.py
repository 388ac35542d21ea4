"""What is asked of a decode slot, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tte_jax.engine.inputs import ModelInput
from tte_jax.engine.next_token import Control
from tte_jax.engine.slot_embedding import Continuation, SlotVector
from tte_jax.engine.stop_texts import StopTexts

ANSWER_RESERVE = 16
"""Tokens kept back for the answer line when the thinking is closed by force."""

NEVER = 2**30


@dataclass(frozen=True)
class Job:
    """One sequence to continue.

    Attributes:
      input: the prompt.
      max_tokens: new tokens, forced ones included; never exceeded.
      close_at: how many tokens may pass before an open think block is closed by force.
      background: waits behind queries; see `Entry`.
      stop: texts that end the sequence; looked for once a dispatch.
      temperature, top_p, seed: 0 = greedy; a draw depends on (seed, token number) alone.
      on_tokens: called on the device thread with each dispatch's new ids and whether they are the
        last; must not block.
      embed: from the new ids to what the embedder's sequence has beyond them, or None where that
        cannot be said; called on the device thread, once, when the sequence has ended. None = the
        sequence is not embedded.
    """

    input: ModelInput
    max_tokens: int
    close_at: int = NEVER
    background: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: StopTexts | None = None
    on_tokens: Callable[[list[int], bool], None] | None = None
    embed: Callable[[list[int]], Continuation | None] | None = None


@dataclass(frozen=True)
class Generated:
    """A finished sequence.

    Attributes:
      tokens: the new ids, forced ones and the stop token included.
      forced: whether the think block was closed by force.
      cached_tokens: tokens of the prompt whose work was saved: those of a kept prefix, and behind
        it vision tokens whose features were cached.
      queue_s, compute_s: seconds waited, and seconds from leaving the queue to the last token.
      embedding: of the sequence, where it was asked for and could be made from its slot.
    """

    tokens: list[int]
    forced: bool
    cached_tokens: int
    queue_s: float
    compute_s: float
    embedding: SlotVector | None = None


def think_limit(max_tokens: int, forced: int) -> int | None:
    """After how many tokens the think block is closed, so that tag, label and answer still fit.

    `forced` is the length of the forced close. The answer gets up to `ANSWER_RESERVE` tokens, or
    half of what the close leaves when the budget is small. None: not even the close and one
    token of answer fit.
    """
    room = max_tokens - forced
    if room < 1:
        return None
    return room - min(ANSWER_RESERVE, max(1, room // 2))


def control_of(jobs: Sequence[Job], rows: int) -> Control:
    """Fresh control values of jobs, padded to `rows`."""

    def column(dtype: Any, fill: Any, values: Sequence[Any] = ()) -> np.ndarray:
        out = np.full(rows, fill, dtype)
        out[: len(values)] = values
        return out

    return Control(
        last_token=column(np.int32, 0),
        generated=column(np.int32, 0),
        limit=column(np.int32, 0, [j.max_tokens for j in jobs]),
        close_at=column(np.int32, NEVER, [j.close_at for j in jobs]),
        forced=column(np.int32, -1),
        matched=column(np.int32, 0),
        closed=column(np.bool_, False),
        done=column(np.bool_, False),
        failed=column(np.bool_, False),
        temperature=column(np.float32, 0.0, [j.temperature for j in jobs]),
        top_p=column(np.float32, 1.0, [j.top_p for j in jobs]),
        seed=column(np.uint32, 0, [j.seed & 0xFFFFFFFF for j in jobs]),
    )
