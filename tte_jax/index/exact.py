"""Exact cosine search in NumPy: the small corpus, the delta, filtered survivors, and the oracle.

`np.vecdot` and not `@`: a matrix-vector product is bound by memory, so BLAS threads gain little
(2,000 x 256: 0.03 ms either way), but beside another busy process they wait for each other (12 ms).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# A float32 dot product of unit vectors is off by far less; rows within this of the k-th score
# are scored again in float64, so that rounding never decides who is in the result.
_SLACK = np.float32(1e-5)
# Above this share of rows, one pass over the whole matrix is cheaper than gathering rows.
_GATHER_BELOW = 0.25
_CHUNK_ROWS = 8192


def propose(
    vectors: np.ndarray, query: np.ndarray, k: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """The k rows nearest to `query`, and those that rounding cannot tell from the k-th.

    Args:
      vectors: [N, D] float32, L2-normalised.
      query: [D] float32.
      k: how many are wanted, at least 1.
      rows: [M] int64, the rows that may be chosen; None = all.

    Returns:
      [≥ min(k, M)] int64 rows, unordered.
    """
    count = len(vectors) if rows is None else len(rows)
    if count <= k:
        return np.arange(count, dtype=np.int64) if rows is None else rows
    if rows is None:
        scores = np.vecdot(vectors, query)
    elif count < _GATHER_BELOW * len(vectors):
        scores = np.vecdot(vectors[rows], query)
    else:
        scores = np.vecdot(vectors, query)[rows]
    threshold = np.partition(scores, count - k)[count - k] - _SLACK
    chosen = np.flatnonzero(scores >= threshold)
    return chosen if rows is None else rows[chosen]


def score(vectors: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[M] float32 cosines of the given rows, summed in float64 in one fixed order.

    Equal vectors get equal scores wherever they stand, which a float32 product does not
    promise; ties are therefore real ties.
    """
    out = np.empty(len(rows), dtype=np.float32)
    wide = query.astype(np.float64)
    for start in range(0, len(rows), _CHUNK_ROWS):
        part = rows[start : start + _CHUNK_ROWS]
        out[start : start + len(part)] = (vectors[part] * wide).sum(axis=1)
    return out


def rank(scores: np.ndarray, id_of: Callable[[int], str], k: int) -> list[tuple[int, str, float]]:
    """The k best as (position in `scores`, id, score): falling score, ties by rising id."""
    order = np.argsort(-scores, kind="stable")
    if len(order) > k:
        # Everything tied with the k-th takes part in the ordering by id.
        order = order[: int(np.searchsorted(-scores[order], -scores[order[k - 1]], "right"))]
    best = sorted((-float(scores[i]), id_of(int(i)), int(i)) for i in order)
    return [(i, id, -negative) for negative, id, i in best[:k]]
