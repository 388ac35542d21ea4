"""Exact cosine search in NumPy: the small corpus, the delta, filtered survivors, and the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# A float32 dot product of unit vectors is off by far less; rows within this of the k-th score
# are scored again in float64, so that rounding never decides who is in the result.
SLACK = np.float32(1e-5)
# Above this share of rows, one pass over the whole matrix is cheaper than gathering rows.
_GATHER_BELOW = 0.25
_CHUNK_ROWS = 8192
# Rows scored at once in float64: their temporaries stay in the cache.
_SCORED_ROWS = 256
# Scores that stand in memory at once: 4 MB, which the passes over them find in the cache; and
# queries that a pass over a large matrix serves at least.
_MOST_SCORES = 2**20
_LEAST_QUERIES = 32
# Groups of scores of which only the best is looked at first: so many for each that is wanted, and
# so many at least; and so many scores in one at most.
_GROUPS_A_WANTED = 8
_LEAST_GROUPS = 64
_LARGEST_GROUP = 32


def propose(
    vectors: np.ndarray, queries: np.ndarray, k: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows nearest to each query, and those that rounding cannot tell from the k-th.

    Args:
      vectors: [N, D] float32, L2-normalised.
      queries: [Q, D] float32.
      k: how many are wanted, at least 1.
      rows: [M] int64, the rows that may be chosen; None = all.

    Returns:
      of: [P] int64, the query of each proposal, rising; P ≥ Q · min(k, M).
      rows: [P] int64, the proposed rows, unordered within a query.
    """
    count = len(vectors) if rows is None else len(rows)
    if count <= k:
        chosen = np.arange(count, dtype=np.int64) if rows is None else rows
        return np.repeat(np.arange(len(queries)), count), np.tile(chosen, len(queries))
    at_once = max(_LEAST_QUERIES, _MOST_SCORES // count)
    of: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for start in range(0, len(queries), at_once):
        mine, positions = nearest(_scores(vectors, queries[start : start + at_once], rows), k)
        of.append(mine + start)
        found.append(positions if rows is None else rows[positions])
    return np.concatenate(of), np.concatenate(found)


def nearest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of [Q, M] float32 scores, M > k, the k highest and those within the slack.

    The k-th best of the groups' best is a bound that at least k scores reach and few more, so only
    those few are partitioned: two passes over everything, and no sorting of it.

    Returns ([P] row of each, rising; [P] position in it).
    """
    rows, count = scores.shape
    size = count // max(_GROUPS_A_WANTED * k, _LEAST_GROUPS, count // _LARGEST_GROUP)
    if size < 2:
        return _positions(scores, np.partition(scores, count - k, axis=1)[:, count - k])
    groups = count // size
    best = scores[:, : groups * size].reshape(rows, size, groups).max(axis=1)
    left = count - groups * size  # fewer than `size`, which is less than `groups`
    if left:
        np.maximum(best[:, :left], scores[:, groups * size :], out=best[:, :left])
    bound = np.partition(best, groups - k, axis=1)[:, groups - k]
    of, positions = _positions(scores, bound)
    if len(of) == rows * k:
        return of, positions
    values = scores[of, positions]
    counts = np.bincount(of, minlength=rows)
    width = int(counts.max())
    few = np.full((rows, width), -np.inf, np.float32)
    few[of, np.arange(len(of)) - (np.cumsum(counts) - counts)[of]] = values
    kth = np.partition(few, width - k, axis=1)[:, width - k]
    near = values >= kth[of] - SLACK
    return of[near], positions[near]


def _positions(scores: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, position) of the [Q, M] scores that reach their row's bound, but for the slack."""
    # Ten times as fast as `nonzero` in two dimensions.
    return np.divmod(np.flatnonzero(scores >= (bound - SLACK)[:, None]), scores.shape[1])


def score(vectors: np.ndarray, queries: np.ndarray, of: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[P] float32 cosines of `queries[of]` and `vectors[rows]`, summed in float64 in one fixed
    order. `of` rises, and is not looked at where there is one query.

    Equal vectors get equal scores wherever they stand, which a float32 product does not
    promise; ties are therefore real ties.
    """
    wide = queries.astype(np.float64)
    if len(wide) == 1:
        return _block_scores(vectors, wide, rows[None])[0]
    if not len(rows):
        return np.empty(0, dtype=np.float32)
    # Nearly all queries have equally many rows: then none needs a copy of its query for each.
    counts = np.bincount(of, minlength=len(wide))
    width = int(np.bincount(counts[counts > 0]).argmax())
    even = counts == width
    if even.all():
        return _block_scores(vectors, wide, rows.reshape(-1, width)).ravel()
    out = np.empty(len(rows), dtype=np.float32)
    mine = even[of]
    out[mine] = _block_scores(vectors, wide[even], rows[mine].reshape(-1, width)).ravel()
    rest = np.flatnonzero(~mine)
    for start in range(0, len(rest), _SCORED_ROWS):
        part = rest[start : start + _SCORED_ROWS]
        out[part] = np.vecdot(vectors[rows[part]].astype(np.float64), wide[of[part]])
    return out


def _block_scores(vectors: np.ndarray, wide: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[Q, C] float32: `score` of the [Q, C] rows with [Q, D] float64 queries."""
    out = np.empty(rows.shape, dtype=np.float32)
    queries, width = rows.shape
    at_once = max(1, _SCORED_ROWS // max(1, width))
    for start in range(0, queries, at_once):
        asked = wide[start : start + at_once, None]
        for left in range(0, width, _SCORED_ROWS):
            part = slice(start, start + at_once), slice(left, left + _SCORED_ROWS)
            out[part] = np.vecdot(vectors[rows[part]].astype(np.float64), asked)
    return out


def rank(scores: np.ndarray, id_of: Callable[[int], str], k: int) -> list[tuple[int, str, float]]:
    """The k best as (position in `scores`, id, score): falling score, ties by rising id."""
    order = np.argsort(-scores, kind="stable")
    if len(order) > k:
        # Everything tied with the k-th takes part in the ordering by id.
        order = order[: int(np.searchsorted(-scores[order], -scores[order[k - 1]], "right"))]
    best = sorted((-float(scores[i]), id_of(int(i)), int(i)) for i in order)
    return [(i, id, -negative) for negative, id, i in best[:k]]


def _scores(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """[Q, N or M] float32."""
    if rows is None:
        return _product(queries, vectors)
    if len(rows) >= _GATHER_BELOW * len(vectors):
        return _product(queries, vectors)[:, rows]
    out = np.empty((len(queries), len(rows)), np.float32)
    for start in range(0, len(rows), _CHUNK_ROWS):
        part = rows[start : start + _CHUNK_ROWS]
        out[:, start : start + len(part)] = _product(queries, vectors[part])
    return out


def _product(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    # A matrix-vector product is bound by memory, so BLAS threads gain little (2,000 x 256: 0.03 ms
    # either way), but beside another busy process they wait for each other (12 ms).
    if len(queries) == 1:
        return np.vecdot(vectors, queries[0])[None]
    return queries @ vectors.T
