"""Searching one view: the generation through its searcher or exactly, the delta exactly, and both
ranked as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from tte_jax.content import Metadata
from tte_jax.filters import Filter
from tte_jax.index import exact
from tte_jax.index.generation import View
from tte_jax.index.recall import wanted_rows
from tte_jax.index.reports import Found

# When fewer rows than this share survive filter and tombstones, scanning them is faster and
# better than over-fetching (measured: at 10 % over-fetching five-fold finds half of the truth).
EXACT_SHARE = 0.15
# A `Found` of its three fields, a third of the time that its constructor takes.
_FOUND: Callable[[tuple[str, float, Metadata]], Found] = partial(tuple.__new__, Found)


def search(
    view: View, queries: np.ndarray, k: int, filter: Filter | None = None
) -> list[list[Found]]:
    """For each of `queries` [Q, D] the k live rows of highest cosine, ties by id.

    Candidates of all queries go through every step as one array, so that a query of a batch does
    not pay for the steps' overhead.
    """
    rows, delta = view.generation.rows, view.delta
    of, built = candidates(view, queries, k, filter)
    scores = exact.score(rows.vectors, queries, of, built)
    fresh = view.fresh
    if filter is not None and len(fresh):
        keep = [filter.matches(delta.metadata[i]) for i in fresh]
        fresh = fresh[np.array(keep, dtype=bool)]
    if not len(fresh):
        places, ids, metadata = built, rows.ids, rows.metadata
    else:
        of_new, new = exact.propose(view.delta_vectors, queries, k, fresh)
        scores = np.concatenate([scores, exact.score(view.delta_vectors, queries, of_new, new)])
        # Beyond the generation's rows stand those of the delta.
        of = np.concatenate([of, of_new])
        places = np.concatenate([built, len(rows) + new])
        ids, metadata = _Joined(rows.ids, delta.ids), _Joined(rows.metadata, delta.metadata)
    return _ranked(of, places, scores, len(queries), k, ids, metadata)


def survivors(view: View, filter: Filter | None) -> np.ndarray:
    """[N] bool: rows of the generation that are alive and match."""
    if filter is None:
        return view.alive
    return view.alive & view.generation.columns.mask(filter)


def candidates(
    view: View, queries: np.ndarray, k: int, filter: Filter | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the generation that may be among the k nearest survivors of each query.

    Returns ([P] query of each, rising; [P] int64 rows), as `exact.propose`.
    """
    generation = view.generation
    vectors = generation.rows.vectors
    keep = survivors(view, filter)
    count = view.alive_count if filter is None else int(np.count_nonzero(keep))
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    whole = count == len(keep)
    share = count / len(keep)
    if generation.searcher is None or share < EXACT_SHARE or wanted_rows(k, share) >= count:
        return exact.propose(vectors, queries, k, None if whole else np.flatnonzero(keep))
    rows, scores = generation.searcher.propose(queries, wanted_rows(k, share))
    if whole and len(queries) == 1 and rows.shape[1] > k:  # the way of most searches, in few steps
        # ScaNN's best come first; only what rounding cannot tell from the k-th is worth a second
        # look.
        near = rows[0, : int((scores[0] >= scores[0, k - 1] - exact.SLACK).sum())]
        return np.zeros(len(near), np.int64), near
    if not whole:
        scores = np.where(keep[rows] & (rows >= 0), scores, -np.inf)
    found = np.count_nonzero(np.isfinite(scores), axis=1)
    width = scores.shape[1]
    if width > k:
        kth = np.partition(scores, width - k, axis=1)[:, width - k, None]
        near = scores >= kth - exact.SLACK
    else:
        near = np.isfinite(scores)
    # Where the filter's survivors lie far from the query, too few were fetched.
    short = np.flatnonzero(found < k)
    if not len(short):
        of, columns = np.nonzero(near)
        return of, rows[of, columns]
    near[short] = False
    of, columns = np.nonzero(near)
    of_more, more = exact.propose(
        vectors, queries[short], k, None if whole else np.flatnonzero(keep)
    )
    of_all = np.concatenate([of, short[of_more]])
    order = np.argsort(of_all, kind="stable")
    return of_all[order], np.concatenate([rows[of, columns], more])[order]


def _ranked(
    of: np.ndarray,
    places: np.ndarray,
    scores: np.ndarray,
    queries: int,
    k: int,
    ids: list[str] | _Joined,
    metadata: Sequence[Metadata] | _Joined,
) -> list[list[Found]]:
    """The k best of each query by falling score, ties by rising id.

    Args:
      of, places, scores: [P] query, place in `ids` and `metadata`, and score of each candidate.
    """
    if queries == 1:
        # Python sorts a few faster than NumPy is called.
        named = [(ids[place], place) for place in places.tolist()]
        ranked = sorted(zip((-scores).tolist(), named, strict=True))[:k]
        return [[Found(id, -negative, metadata[place]) for negative, (id, place) in ranked]]
    order = np.lexsort((-scores, of))
    of, places, scores = of[order], places[order], scores[order]
    borders = np.searchsorted(of, np.arange(queries + 1))
    position = np.arange(len(of)) - borders[of]
    best = position < k
    kept = places[best].tolist()
    fields = zip(
        [ids[place] for place in kept],
        scores[best].tolist(),
        [metadata[place] for place in kept],
        strict=True,
    )
    found = list(map(_FOUND, fields))
    ends = np.minimum(np.diff(borders), k).cumsum().tolist()
    out = [found[start:end] for start, end in pairwise([0, *ends])]
    equal = (scores[1:] == scores[:-1]) & (of[1:] == of[:-1]) & best[:-1]
    for query in np.unique(of[1:][equal]).tolist() if equal.any() else ():
        start, end = borders[query], borders[query + 1]
        mine = places[start:end].tolist()
        ranked = exact.rank(scores[start:end], lambda i, mine=mine: ids[mine[i]], k)
        out[query] = [Found(id, cosine, metadata[mine[i]]) for i, id, cosine in ranked]
    return out


class _Joined:
    """Two lists, indexed as one, without copying them."""

    def __init__(self, first, second) -> None:
        self._first, self._second = first, second
        self._border = len(first)

    def __getitem__(self, place: int):
        if place < self._border:
            return self._first[place]
        return self._second[place - self._border]
