"""Sequences of unequal length in rows of one length. Pure functions over lengths.

    row 0   aaaaaaaaaaaaaaaaaabbbbbbbbbbbbb.
    row 1   ccccccccccddddddddddeeeeeeeee...     T = 32, five sequences, four places of padding

A row takes sequences while they fit, so that what a batch costs is about what its inputs are long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tte_jax.engine.buckets import DISPATCH_TOKENS, Shape

TOKENS_PER_SEQUENCE = 16
"""A row of T tokens holds at most T / 16 sequences: each has a place in the program's result. The
shortest prompts are about as long."""

EVEN = 2
"""Sequences begin at even tokens. Where a product has few rows (the last layer's, of pooled tokens
only), CPU kernels sum even and odd keys apart, and a sequence moved by one would differ in its last
bits (seen with AVX-512)."""


def most_sequences(tokens: int) -> int:
    """J: how many sequences a row of `tokens` tokens holds at most."""
    return max(1, tokens // TOKENS_PER_SEQUENCE)


@dataclass
class Rows:
    """The rows of one shape and how full they are.

    Attributes:
      shape: (rows, tokens).
      used: where the next sequence of each row would begin.
      counts: sequences in each row.
    """

    shape: Shape
    used: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, length: int) -> tuple[int, int, int] | None:
        """Puts a sequence into the first row that has room.

        Returns:
          (row, first token, number within the row), or None when no row has room.
        """
        rows, tokens = self.shape
        most = most_sequences(tokens)
        for row, (used, count) in enumerate(zip(self.used, self.counts, strict=True)):
            if used + length <= tokens and count < most:
                self.used[row] = _even(used + length)
                self.counts[row] += 1
                return row, used, count
        if len(self.used) == rows or length > tokens:
            return None
        self.used.append(_even(length))
        self.counts.append(1)
        return len(self.used) - 1, 0, 0


@dataclass(frozen=True)
class Place:
    """Where input `index` (of the caller's list) stands: from token `start` of `row`, as its
    sequence `number`, counted from 0."""

    index: int
    row: int
    start: int
    number: int


@dataclass(frozen=True)
class PackedBatch:
    """Inputs that run together in the bucket `shape`; `rows` of its rows have something in them."""

    shape: Shape
    rows: int
    places: tuple[Place, ...]


def widest(length: int, table: Iterable[Shape]) -> Shape:
    """The shape with room for most tokens among those whose rows hold a sequence of `length`.

    Raises:
      ValueError: none does.
    """
    return max((s for s in table if s[1] >= length), key=lambda s: (s[0] * s[1], -s[1]))


def plan_packed(lengths: Sequence[int], table: Sequence[Shape]) -> list[PackedBatch]:
    """Cuts inputs into batches of bucket shapes, the longest first, each into the first row with
    room; every batch takes the shape in which a token costs least.

    Args:
      lengths: tokens of each input, none longer than the longest row.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[PackedBatch] = []
    while left:
        fitting = (shape for shape in table if shape[1] >= lengths[left[0]])
        best = min((_fill(left, lengths, shape) for shape in fitting), key=lambda filled: filled[0])
        batches.append(best[1])
        taken = {place.index for place in best[1].places}
        left = [i for i in left if i not in taken]
    return batches


def _fill(
    left: Sequence[int], lengths: Sequence[int], shape: Shape
) -> tuple[tuple[float, int], PackedBatch]:
    """The batch that a shape makes of the inputs, and what a token costs in it."""
    rows, places, tokens = Rows(shape), [], 0
    for index in left:
        if (at := rows.add(lengths[index])) is not None:
            places.append(Place(index, *at))
            tokens += lengths[index]
    cost = (shape[0] * shape[1] + DISPATCH_TOKENS) / tokens
    return (cost, -tokens), PackedBatch(shape, len(rows.used), tuple(places))


def _even(tokens: int) -> int:
    return -(-tokens // EVEN) * EVEN
