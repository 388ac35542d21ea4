"""ScaNN as a searcher over rows.

ScaNN's own document ids are never used: its loader unpickles them, its `delete` leaves the id map
wrong when one id is unknown, and its reads race with its writes. Rows are plain integers here, a
searcher is built once and never changed, and nothing of it is written to disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scann import scann_ops_pybind

# Below this many rows there is nothing to train a codebook on.
MINIMUM_ROWS = 256
_DIMENSIONS_PER_BLOCK = 2
_ANISOTROPIC_THRESHOLD = 0.2
_TRAINING_ROWS = 100_000
_REORDER = 100
_MAX_REORDER = 3200
# Fewer queries are not worth handing to other threads.
_QUERIES_PER_THREAD = 4


class ScannSearcher:
    """Asymmetric hashing with exact reordering; with a partitioning tree for large corpora.

    Args:
      vectors: [N, D] float32, L2-normalised, N ≥ `MINIMUM_ROWS`. ScaNN keeps its own copy.
      tree: whether to partition; ScaNN's advice, and our measurement, is not below 100k rows.
      threads: training threads.
      search_threads: threads that share a batch of queries; a single query uses its caller's.
    """

    def __init__(
        self, vectors: np.ndarray, *, tree: bool, threads: int = 1, search_threads: int = 1
    ) -> None:
        rows = len(vectors)
        if rows < MINIMUM_ROWS:
            raise ValueError(f"ScaNN needs at least {MINIMUM_ROWS} rows, got {rows}")
        self.kind = "scann-tree-ah" if tree else "scann-ah"
        self._rows = rows
        self._reorder = _REORDER
        self._leaves = max(2, round(math.sqrt(rows))) if tree else 0
        self._leaves_to_search = max(1, math.ceil(self._leaves / 4))
        # ScaNN's builder methods are decorated in a way that hides their types.
        builder: Any = scann_ops_pybind.builder(
            np.ascontiguousarray(vectors, dtype=np.float32), 10, "dot_product"
        )
        if tree:
            builder = builder.tree(
                self._leaves,
                self._leaves_to_search,
                training_sample_size=min(rows, _TRAINING_ROWS),
            )
        builder = builder.score_ah(
            _DIMENSIONS_PER_BLOCK,
            anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD,
            training_sample_size=min(rows, _TRAINING_ROWS),
        ).reorder(_REORDER)
        self._searcher = builder.set_n_training_threads(threads).build()
        self._threads = search_threads
        self._searcher.set_num_threads(search_threads)

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.propose`; a tree may return fewer rows than asked for."""
        count = min(count, self._rows)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        wanted = (
            count,
            min(self._rows, max(self._reorder, 2 * count)),
            self._leaves_to_search if self._leaves else -1,
        )
        if len(queries) == 1:
            rows, scores = self._searcher.search(queries[0], *wanted)
            return rows.astype(np.int64)[None], scores[None]
        if len(queries) < self._threads * _QUERIES_PER_THREAD:
            rows, scores = self._searcher.search_batched(queries, *wanted)
        else:
            share = math.ceil(len(queries) / self._threads)
            rows, scores = self._searcher.search_batched_parallel(
                queries, *wanted, batch_size=share
            )
        # Where it finds too few, ScaNN fills up with row 0 at a distance of NaN.
        missing = np.isnan(scores)
        return np.where(missing, -1, rows.astype(np.int64)), np.where(missing, -np.inf, scores)

    def search_harder(self) -> bool:
        """Double the leaves searched and the rows reordered; False when both are at their end."""
        leaves = min(self._leaves, 2 * self._leaves_to_search)
        reorder = min(_MAX_REORDER, 2 * self._reorder, self._rows)
        if (not self._leaves or leaves == self._leaves_to_search) and reorder == self._reorder:
            return False
        self._leaves_to_search = leaves if self._leaves else self._leaves_to_search
        self._reorder = reorder
        return True
