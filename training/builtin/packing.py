"""Sequences of unequal length, laid end to end in rows of one length.

Padded to the longest, a third of a batch would be pads. Host work on NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from tte_jax.preprocess.tokenizer import Tokenizer

# NumPy where a batch is made, traced inside a step.
Leaf = Any

PROMPT, ECR, ALONE = 0, 1, 2  # parts of a sequence


class Placed(NamedTuple):
    """A prompt's token ids, its position rows [3, n], and the position that follows them."""

    ids: np.ndarray
    positions: np.ndarray
    following: int


@dataclass(frozen=True)
class Example:
    """One sequence: prompt, ECR, `<|im_end|>`, and a lone `<|im_end|>`.

    The last token sees the prompt only. It is the sequence's own "no reasoning" ending, so one
    pass yields the embedding with and without ECR.

    Attributes:
      truth: the ECR to learn; `shown`: the one that stands in the sequence. Where they differ,
        nothing is learnt from it as text.
      picture: which picture of the batch the prompt shows; None = none.
    """

    prompt: Placed
    truth: str
    shown: str
    picture: int | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """R rows of T tokens that hold S sequences and K tokens to learn.

    Attributes:
      ids: [R, T] int32.
      positions: [R, 3, T] int32.
      vis_idx: [R, T] int32, row of the vision table or -1.
      sequence: [R, T] int32, which sequence a token is of; -1 = pad.
      part: [R, T] int32, PROMPT, ECR (its `<|im_end|>` included) or ALONE.
      end: [S] int32, flat place (row * T + column) of the `<|im_end|>` after each ECR.
      alone: [S] int32, flat place of each lone `<|im_end|>`.
      asked: [K] int32, flat places whose next token is learnt.
      targets: [K] int32, those next tokens.
      weights: [K] float32, 0 where the room was not needed.
    """

    ids: Leaf
    positions: Leaf
    vis_idx: Leaf
    sequence: Leaf
    part: Leaf
    end: Leaf
    alone: Leaf
    asked: Leaf
    targets: Leaf
    weights: Leaf


class Packer:
    """Lays out sequences. `features`: vision tokens of one picture."""

    def __init__(self, tokenizer: Tokenizer, *, image_token: int, features: int) -> None:
        self._end = tokenizer.token_id("<|im_end|>")
        self._pad = tokenizer.token_id("<|endoftext|>")
        self._image = image_token
        self._features = features
        self._encode = lru_cache(None)(tokenizer.encode_tagged)

    def pack(
        self, examples: Sequence[Example], *, rows: int, length: int, targets: int
    ) -> Packed | None:
        """First fit, longest first; None when the sequences do not fit into the rows.

        Where there is more to learn than `targets` tokens, the last examples' share is left out.
        """
        ecrs = [[*self._encode(e.shown), self._end] for e in examples]
        sizes = np.array(
            [len(e.prompt.ids) + len(c) + 1 for e, c in zip(examples, ecrs, strict=True)]
        )
        places = _first_fit(sizes, rows, length)
        if places is None:
            return None
        out = Packed(
            ids=np.full((rows, length), self._pad, np.int32),
            positions=np.zeros((rows, 3, length), np.int32),
            vis_idx=np.full((rows, length), -1, np.int32),
            sequence=np.full((rows, length), -1, np.int32),
            part=np.zeros((rows, length), np.int32),
            end=np.zeros(len(examples), np.int32),
            alone=np.zeros(len(examples), np.int32),
            asked=np.zeros(targets, np.int32),
            targets=np.full(targets, self._pad, np.int32),
            weights=np.zeros(targets, np.float32),
        )
        learnt = 0
        for i, (example, ecr, (row, start)) in enumerate(zip(examples, ecrs, places, strict=True)):
            prompt = example.prompt
            n, m = len(prompt.ids), len(ecr)
            here = slice(start, start + n + m + 1)
            out.ids[row, here] = [*prompt.ids, *ecr, self._end]
            out.positions[row, :, start : start + n] = prompt.positions
            out.positions[row, :, start + n : start + n + m] = prompt.following + np.arange(m)
            out.positions[row, :, start + n + m] = prompt.following
            out.sequence[row, here] = i
            out.part[row, start + n : start + n + m] = ECR
            out.part[row, start + n + m] = ALONE
            if example.picture is not None:
                where = start + np.flatnonzero(prompt.ids == self._image)
                first = example.picture * self._features
                out.vis_idx[row, where] = first + np.arange(self._features)
            flat = row * length + start
            out.end[i], out.alone[i] = flat + n + m - 1, flat + n + m
            if example.shown == example.truth:
                m = min(m, targets - learnt)
                out.asked[learnt : learnt + m] = flat + n - 1 + np.arange(m)
                out.targets[learnt : learnt + m] = ecr[:m]
                out.weights[learnt : learnt + m] = 1.0
                learnt += m
        return out


def _first_fit(sizes: np.ndarray, rows: int, length: int) -> list[tuple[int, int]] | None:
    """(row, start) of each size; None when they do not fit."""
    used = np.zeros(rows, int)
    places = [(0, 0)] * len(sizes)
    for i in np.argsort(-sizes, kind="stable"):
        fitting = np.flatnonzero(used + sizes[i] <= length)
        if not len(fitting):
            return None
        places[i] = (int(fitting[0]), int(used[fitting[0]]))
        used[fitting[0]] += sizes[i]
    return places
