"""The immutable pieces that a search reads: a generation, the delta in front of it, and a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tte_jax.content import Metadata
from tte_jax.index.columns import Columns
from tte_jax.index.protocol import Searcher


@dataclass(frozen=True)
class Rows:
    """Documents as parallel arrays.

    Attributes:
      ids: document id of each row.
      vectors: [N, D] float32, L2-normalised.
      sequences: [N] int64, the write that made the row.
      metadata: metadata of each row.
    """

    ids: list[str]
    vectors: np.ndarray
    sequences: np.ndarray
    metadata: Sequence[Metadata]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls) -> Rows:
        return cls([], np.zeros((0, 0), np.float32), np.zeros(0, np.int64), [])


@dataclass(frozen=True)
class Generation:
    """One built index: rows that never change and the searcher over them.

    Attributes:
      number: counts generations from 1; a new one replaces the old in one assignment.
      rows: the documents.
      searcher: approximate searcher, `None` = exact search.
      columns: the rows' metadata by field.
      recall: on the canary sample when it was built (`recall.check_recall`); 1 for exact search.
    """

    number: int
    rows: Rows
    searcher: Searcher | None
    columns: Columns
    recall: float = 1.0


class Delta:
    """Rows written since the generation was built; append-only, so that views can share it.

    A view remembers how many rows it may read. Rows below that count never change; the writer
    fills rows above it, or moves to a larger buffer and leaves the old one to its views.
    """

    def __init__(self, dimension: int) -> None:
        self.ids: list[str] = []
        self.metadata: list[Metadata] = []
        self.sequences: list[int] = []
        self.vectors = np.zeros((64, dimension), np.float32)

    def append(self, id: str, vector: np.ndarray, metadata: Metadata, sequence: int) -> int:
        """Add a row and return its number."""
        row = len(self.ids)
        if row == len(self.vectors):
            grown = np.zeros((2 * row, self.vectors.shape[1]), np.float32)
            grown[:row] = self.vectors
            self.vectors = grown
        self.vectors[row] = vector
        self.metadata.append(metadata)
        self.sequences.append(sequence)
        self.ids.append(id)
        return row


@dataclass(frozen=True)
class View:
    """What one search sees: fixed for ever, replaced whole by every write.

    Attributes:
      generation: the built part.
      alive: [N] bool, generation rows that are neither deleted nor replaced.
      alive_count: how many of them are alive (counting a million takes as long as a search).
      delta: rows written since; only the first `len(delta_alive)` belong to this view.
      delta_vectors: the delta's buffer as it was when the view was made.
      delta_alive: [M] bool.
      sequence: the last write that this view contains.
    """

    generation: Generation
    alive: np.ndarray
    delta: Delta
    delta_vectors: np.ndarray
    delta_alive: np.ndarray
    sequence: int
    alive_count: int
    live: int = 0

    @cached_property
    def fresh(self) -> np.ndarray:
        """The delta's live rows, rising."""
        return np.flatnonzero(self.delta_alive)

    @cached_property
    def dimension(self) -> int:
        """D of the live rows' vectors; 0 when there is none."""
        if not self.live:
            return 0
        source = self.delta_vectors if len(self.fresh) else self.generation.rows.vectors
        return source.shape[1]

    def gather(self) -> Rows:
        """Copy the live rows out, generation first."""
        old = self.generation.rows
        kept = np.flatnonzero(self.alive).tolist()
        new = self.fresh.tolist()
        if not kept and not new:
            return Rows.empty()
        vectors = [
            source[rows]
            for source, rows in ((old.vectors, kept), (self.delta_vectors, new))
            if len(rows)
        ]
        return Rows(
            ids=[old.ids[i] for i in kept] + [self.delta.ids[i] for i in new],
            vectors=np.concatenate(vectors),
            sequences=np.concatenate(
                [old.sequences[kept], np.array([self.delta.sequences[i] for i in new], np.int64)]
            ),
            metadata=[old.metadata[i] for i in kept] + [self.delta.metadata[i] for i in new],
        )
