"""ScaNN as a searcher over rows.

ScaNN's own document ids are never used: its loader unpickles them, its `delete` leaves the id map
wrong when one id is unknown, and its reads race with its writes. Rows are plain integers here, a
searcher is built once and never changed, and nothing of it is written to disk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scann import scann_ops_pybind

# Below this many rows there is nothing to train a codebook on.
MINIMUM_ROWS = 256
_DIMENSIONS_PER_BLOCK = 2
_ANISOTROPIC_THRESHOLD = 0.2
_TRAINING_ROWS = 100_000
# Leaves for sqrt(rows); and each row stands in a second leaf too, chosen for the queries that the
# first one is bad for (SOAR, arXiv:2404.00774). Both together, and leaves by direction, are 1.7
# times as fast at a recall of 0.95 as sqrt(rows) leaves alone (100,000 rows; docs/decisions.md).
_LEAVES = 3
_SOAR_LAMBDA = 1.5
_COPIES = 2
# How hard a searcher can try: shares of the tree's leaves, and rows scored exactly after hashing.
_SHARES = tuple(2 ** (-i / 4) for i in range(36, -1, -1))  # 1/512 to 1
_REORDERS = (30, 50, 100, 200, 400, 800, 1600, 3200)
# And at least so many for each that is wanted.
_REORDER_FACTOR = 1.5
# Reading a row's vector out of memory to score it costs as much as scanning the codes of so many.
_CODES_PER_REORDER = 20


class Effort(NamedTuple):
    """How hard a search tries: leaves of the tree that are scanned (0 = there is no tree), and rows
    that are scored exactly."""

    leaves: int
    reorder: int


class ScannSearcher:
    """Asymmetric hashing with exact reordering; with a partitioning tree for large corpora.

    It begins with the least effort; `search_harder` takes the next of `efforts`.

    Args:
      vectors: [N, D] float32, L2-normalised, N ≥ `MINIMUM_ROWS`. ScaNN keeps its own copy.
      tree: whether to partition.
      threads: training threads.

    Attributes:
      library: ScaNN's searcher.
      efforts: what it can be set to, by rising cost.
      effort: what it is set to; not to be changed while it serves.
    """

    def __init__(self, vectors: np.ndarray, *, tree: bool, threads: int = 1) -> None:
        rows = len(vectors)
        if rows < MINIMUM_ROWS:
            raise ValueError(f"ScaNN needs at least {MINIMUM_ROWS} rows, got {rows}")
        self.kind = "scann-tree-ah" if tree else "scann-ah"
        self._rows = rows
        leaves = max(2, round(_LEAVES * math.sqrt(rows))) if tree else 0
        self.efforts = efforts(rows, leaves)
        self.effort = self.efforts[0]
        # ScaNN's builder methods are decorated in a way that hides their types.
        builder: Any = scann_ops_pybind.builder(
            np.ascontiguousarray(vectors, dtype=np.float32), 10, "dot_product"
        )
        if tree:
            builder = builder.tree(
                leaves,
                leaves,
                training_sample_size=min(rows, _TRAINING_ROWS),
                spherical=True,
                soar_lambda=_SOAR_LAMBDA,
            )
        builder = builder.score_ah(
            _DIMENSIONS_PER_BLOCK,
            anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD,
            training_sample_size=min(rows, _TRAINING_ROWS),
        ).reorder(_REORDERS[0])
        self.library = builder.set_n_training_threads(threads).build()

    def asked(self, count: int) -> tuple[int, int, int]:
        """What ScaNN is asked for: rows, rows that are scored exactly, leaves (-1 = no tree)."""
        count = min(count, self._rows)
        reorder = max(self.effort.reorder, math.ceil(_REORDER_FACTOR * count))
        return count, min(self._rows, reorder), self.effort.leaves or -1

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.propose`; a tree may return fewer rows than asked for. Works on the
        caller's thread, and lets Python go on in others."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if len(queries) == 1:
            rows, scores = self.library.search(queries[0], *self.asked(count))
            return rows.astype(np.int64)[None], scores[None]
        rows, scores = self.library.search_batched(queries, *self.asked(count))
        # Where it finds too few, ScaNN fills up with row 0 at a distance of NaN.
        missing = np.isnan(scores)
        if not missing.any():
            return rows.astype(np.int64), scores
        return np.where(missing, -1, rows.astype(np.int64)), np.where(missing, -np.inf, scores)

    def search_harder(self) -> bool:
        """Take the next of `efforts`; False at their end."""
        after = self.efforts.index(self.effort) + 1
        if after == len(self.efforts):
            return False
        self.effort = self.efforts[after]
        return True


def efforts(rows: int, leaves: int) -> list[Effort]:
    """What a searcher over `rows` rows in `leaves` leaves can do, by rising cost."""
    scanned = sorted({max(1, round(share * leaves)) for share in _SHARES}) if leaves else [0]
    reordered = sorted({min(reorder, rows) for reorder in _REORDERS})

    def cost(effort: Effort) -> tuple[float, int]:
        share = _COPIES * effort.leaves / leaves if leaves else 1.0
        return share * rows + effort.reorder * _CODES_PER_REORDER, effort.leaves

    return sorted((Effort(s, r) for s in scanned for r in reordered), key=cost)
