"""Searching one view: the generation through its searcher or exactly, the delta exactly, and both
ranked as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np

from tte_jax.content import Metadata
from tte_jax.filters import Filter
from tte_jax.index import exact
from tte_jax.index.crew import Crew
from tte_jax.index.generation import View
from tte_jax.index.protocol import Searcher
from tte_jax.index.recall import wanted_rows
from tte_jax.index.reports import Found

# When fewer rows than this share survive filter and tombstones, scanning them is faster and
# better than over-fetching (measured: at 10 % over-fetching five-fold finds half of the truth).
EXACT_SHARE = 0.15
# A batch is shared among threads in parts of at least so many queries: fewer are not worth it, and
# ScaNN scans a batch of fewer than ten in another way, whose scores differ in their last bits.
_LEAST_PART = 16
# Where ScaNN answers, a part is not much larger than this: several parts for each thread, so that
# they do not all need Python at the same moment.
_USUAL_PART = 128
# A `Found` of its three fields, a third of the time that its constructor takes.
_FOUND: Callable[[tuple[str, float, Metadata]], Found] = partial(tuple.__new__, Found)


class ViewSearch:
    """What all queries of a search share: a view, k, a filter, and what follows from them.

    Args:
      k: at least 1.
      filter: condition on metadata.
    """

    def __init__(self, view: View, k: int, filter: Filter | None = None) -> None:
        self._view, self._k = view, k
        generation, delta = view.generation, view.delta
        self._rows = generation.rows
        self._keep, self._count = view.alive, view.alive_count
        # Live rows of the delta that match.
        self._fresh = view.fresh
        if filter is not None:
            self._keep = view.alive & generation.columns.mask(filter)
            self._count = int(np.count_nonzero(self._keep))
            matching = [filter.matches(delta.metadata[i]) for i in self._fresh]
            self._fresh = self._fresh[np.array(matching, dtype=bool)]
        self._whole = self._count == len(self._keep)
        share = self._count / len(self._keep) if self._count else 0.0
        # Rows to ask of the searcher; 0 = the search is exact.
        self._wanted = 0
        self._searcher: Searcher | None = None
        if generation.searcher is not None and share >= EXACT_SHARE:
            self._wanted = wanted_rows(k, share)
            if self._wanted < self._count:
                self._searcher = generation.searcher

    @cached_property
    def survivors(self) -> np.ndarray:
        """[M] int64, rising: rows of the generation that are alive and match."""
        return np.flatnonzero(self._keep)

    def answer(self, queries: np.ndarray, crew: Crew) -> list[list[Found]]:
        """For each of `queries` [Q, D] the k live rows of highest cosine, ties by id."""
        parts = crew.threads
        if self._searcher is not None:
            parts = max(parts, len(queries) // _USUAL_PART)
        parts = min(parts, len(queries) // _LEAST_PART)
        if parts < 2:
            return self._answer(queries)
        answers = crew.map(self._answer, np.array_split(queries, parts))
        return [found for answer in answers for found in answer]

    def candidates(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the generation that may be among the k nearest survivors of each query.

        Returns ([P] query of each, rising; [P] int64 rows), as `exact.propose`.
        """
        if not self._count:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if self._searcher is None:
            return self._exactly(queries)
        rows, scores = self._searcher.propose(queries, self._wanted)
        if not self._whole:
            scores = np.where(self._keep[rows] & (rows >= 0), scores, -np.inf)
        width = scores.shape[1]
        if width > self._k:
            kth = np.partition(scores, width - self._k, axis=1)[:, width - self._k]
            # Where the filter's survivors lie far from the query, too few were fetched.
            short = np.flatnonzero(kth == -np.inf)
            near = scores >= (kth - exact.SLACK)[:, None]
        else:
            near = np.isfinite(scores)
            short = np.flatnonzero(np.count_nonzero(near, axis=1) < self._k)
        near[short] = False
        flat = np.flatnonzero(near)
        of, built = flat // width, rows.ravel()[flat]
        if not len(short):
            return of, built
        of_more, more = self._exactly(queries[short])
        of_all = np.concatenate([of, short[of_more]])
        order = np.argsort(of_all, kind="stable")
        return of_all[order], np.concatenate([built, more])[order]

    def _exactly(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        survivors = None if self._whole else self.survivors
        return exact.propose(self._rows.vectors, queries, self._k, survivors)

    def _answer(self, queries: np.ndarray) -> list[list[Found]]:
        """Candidates of all queries go through every step as one array, so that a query of a batch
        does not pay for the steps' overhead."""
        plain = self._searcher is not None and self._whole and not len(self._fresh)
        if plain and len(queries) == 1 and (found := self._answer_alone(queries)):
            return [found]
        rows, delta, fresh = self._rows, self._view.delta, self._fresh
        of, places = self.candidates(queries)
        scores = exact.score(rows.vectors, queries, of, places)
        ids, metadata = rows.ids, rows.metadata
        if len(fresh):
            vectors = self._view.delta_vectors
            of_new, new = exact.propose(vectors, queries, self._k, fresh)
            scores = np.concatenate([scores, exact.score(vectors, queries, of_new, new)])
            # Beyond the generation's rows stand those of the delta.
            places = np.concatenate([places, len(rows) + new])
            of = np.concatenate([of, of_new])
            order = np.argsort(of, kind="stable")
            of, places, scores = of[order], places[order], scores[order]
            ids, metadata = _Joined(rows.ids, delta.ids), _Joined(rows.metadata, delta.metadata)
        return _ranked(of, places, scores, len(queries), self._k, ids, metadata)

    def _answer_alone(self, query: np.ndarray) -> list[Found]:
        """The answer to [1, D], with nothing between it and the searcher; none when the searcher
        finds too few.

        The way of most searches. After a scan the processor's caches hold codes, so that every
        step begins cold: these are as few as can be, and few values are Python's business.
        """
        assert self._searcher is not None
        k, rows = self._k, self._rows
        found, scores = self._searcher.propose(query, self._wanted)
        places, near = found[0], scores[0].tolist()
        if len(near) <= k:
            return []
        # ScaNN's best come first; only what rounding cannot tell from the k-th is worth a second
        # look.
        least, last = near[k - 1] - float(exact.SLACK), k
        while last < len(near) and near[last] >= least:
            last += 1
        places = places[:last]
        exactly = exact.score(rows.vectors, query, _FIRST, places)
        return _best(places, exactly, k, rows.ids, rows.metadata)


_FIRST = np.zeros(0, np.int64)  # of one query, nothing needs to be told apart


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
      of, places, scores: [P] query (rising), place in `ids` and `metadata`, and score of each
        candidate.
    """
    if not len(of):
        return [[] for _ in range(queries)]
    if queries == 1:
        return [_best(places, scores, k, ids, metadata)]
    # Nearly all queries have equally many candidates: those are sorted as one block.
    counts = np.bincount(of, minlength=queries)
    width = int(np.bincount(counts).argmax())
    even = counts == width
    out: list[list[Found]] = [[] for _ in range(queries)]
    apart = np.flatnonzero(~even)
    if width:
        chosen = slice(None) if not len(apart) else even[of]
        block = scores[chosen].reshape(-1, width)
        order = np.argsort(-block, axis=1)
        block = np.take_along_axis(block, order, axis=1)
        tied = (block[:, 1:] == block[:, :-1])[:, :k].any(axis=1)
        named = np.take_along_axis(places[chosen].reshape(-1, width), order, axis=1)[:, :k]
        block, each, flat = block[:, :k], named.shape[1], named.ravel().tolist()
        found = list(
            map(
                _FOUND,
                zip(
                    map(ids.__getitem__, flat),
                    block.ravel().tolist(),
                    map(metadata.__getitem__, flat),
                    strict=True,
                ),
            )
        )
        lists = [found[start : start + each] for start in range(0, len(found), each)]
        if not len(apart):
            out = lists
        else:
            for query, mine in zip(np.flatnonzero(even).tolist(), lists, strict=True):
                out[query] = mine
        if tied.any():
            apart = np.concatenate([apart, np.flatnonzero(even)[tied]])
    ends = np.cumsum(counts)
    for query in apart.tolist():
        mine = slice(ends[query] - counts[query], ends[query])
        out[query] = _best(places[mine], scores[mine], k, ids, metadata)
    return out


def _best(
    places: np.ndarray,
    scores: np.ndarray,
    k: int,
    ids: list[str] | _Joined,
    metadata: Sequence[Metadata] | _Joined,
) -> list[Found]:
    """`_ranked` of one query: Python sorts a few faster than NumPy is called."""
    numbers = places.tolist()
    named = zip((-scores).tolist(), map(ids.__getitem__, numbers), numbers, strict=True)
    return [Found(id, -negative, metadata[place]) for negative, id, place in sorted(named)[:k]]


class _Joined:
    """Two lists, indexed as one, without copying them."""

    def __init__(self, first, second) -> None:
        self._first, self._second = first, second
        self._border = len(first)

    def __getitem__(self, place: int):
        if place < self._border:
            return self._first[place]
        return self._second[place - self._border]
