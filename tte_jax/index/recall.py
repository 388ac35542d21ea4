"""How much of the truth a searcher finds: on canaries before it serves, on real queries while it
does.

A searcher over fixed rows does not change, so ScaNN's own health statistics of it do not either;
what drifts is what is asked. Hence the last queries are kept, and from time to time some of them
are answered a second time, exactly.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tte_jax.filters import Filter
from tte_jax.index import exact
from tte_jax.index.crew import Crew
from tte_jax.index.protocol import Searcher

# What users see, and what the first stage asks for. A filter that keeps a fifth of the rows makes
# ten answers as deep a search as fifty without one.
CANARY_KS = (10, 50)
OVERFETCH = 2.0
OVERFETCH_ROWS = 50
# Where every row may be an answer, only ties with the k-th are fetched in excess.
TIE_ROWS = 10
# Of a batch of queries, so many stand for all when recall is measured.
_KEPT_OF_A_BATCH = 64


class Asked(NamedTuple):
    """A query as it was asked: [D] float32 unit vector, k, filter."""

    vector: np.ndarray
    k: int
    filter: Filter | None = None


class QueryRecall(NamedTuple):
    """Measured on `queries` real queries: how much of the exact answers was found, 0 to 1."""

    recall: float
    queries: int


class QuerySample:
    """The last queries, and whether it is time to check some of them. Safe from many threads.

    Args:
      size: how many are kept.
      check_every: queries between two checks.
    """

    def __init__(self, size: int, check_every: int) -> None:
        self._last: deque[Asked] = deque(maxlen=size)
        self._check_every = check_every
        self._since_check = 0
        self._lock = threading.Lock()

    def note(self, queries: np.ndarray, k: int, filter: Filter | None) -> None:
        """`queries` [Q, D] were asked; of a large batch a part is kept."""
        kept = queries[:: math.ceil(len(queries) / _KEPT_OF_A_BATCH)]
        with self._lock:
            self._last.extend([Asked(query, k, filter) for query in kept])
            self._since_check += len(queries)

    @property
    def due(self) -> bool:
        return self._since_check >= self._check_every

    def draw(self, count: int, dimension: int) -> list[Asked]:
        """At most `count` of the kept queries of this dimension, at random; `due` starts anew."""
        with self._lock:
            self._since_check = 0
            fitting = [asked for asked in self._last if len(asked.vector) == dimension]
        return random.sample(fitting, min(count, len(fitting)))


def wanted_rows(k: int, share: float = 1.0) -> int:
    """How many rows to ask of a searcher when `share` of its rows may be answers."""
    if share == 1.0:
        return k + TIE_ROWS
    return math.ceil(OVERFETCH * k / share) + OVERFETCH_ROWS


def worst_true_scores(
    vectors: np.ndarray, queries: np.ndarray, ks: Sequence[int], rows: np.ndarray | None = None
) -> list[float]:
    """Each query's k-th best score among `rows`: any row that reaches it is a right answer, ties
    too. `queries` is [Q, D], `ks` has one k for each."""
    best = _best_scores(vectors, queries, max(ks), rows)
    return [float(mine[min(k, len(mine)) - 1]) for mine, k in zip(best, ks, strict=True)]


def _best_scores(
    vectors: np.ndarray, queries: np.ndarray, k: int, rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """The scores of each query's k nearest among `rows`, falling; fewer when there are fewer."""
    of, found = exact.propose(vectors, queries, k, rows)
    scores = exact.score(vectors, queries, of, found)
    return [np.sort(scores[of == i])[::-1][:k] for i in range(len(queries))]


def check_recall(
    searcher: Searcher,
    vectors: np.ndarray,
    canaries: int,
    floor: float,
    asked: Sequence[Asked] = (),
    crew: Crew | None = None,
) -> float:
    """Recall of `searcher` against exact search: the lowest of recall@10 and recall@50 on canaries
    and of the recall on real queries.

    Half of the canaries are rows, half lie off the documents, as queries do (a text looking for an
    image, say), where a tree misses more. Below `floor` the
    searcher is made to search harder, step by step, while it can.

    Args:
      vectors: [N, D] float32, the searcher's rows.
      canaries: how many; each counts with 10 neighbours and with 50, apart.
      floor: the recall to reach.
      asked: real queries, each with the k it was asked with; filters play no part here.
      crew: threads that share the queries; none = the caller's alone.
    """
    invented = canary_queries(vectors, canaries)
    sets: list[_Checked] = []
    if asked:
        ks = [min(one.k, len(vectors)) for one in asked]
        queries = np.stack([one.vector for one in asked])
        worst = np.array(worst_true_scores(vectors, queries, ks))
        sets.append(_Checked(queries, np.array(ks), worst))
    best = _best_scores(vectors, invented, max(CANARY_KS))
    for k in CANARY_KS:
        k = min(k, len(vectors))
        worst = np.array([mine[k - 1] for mine in best])
        sets.append(_Checked(invented, np.full(len(invented), k), worst))
    crew = crew or Crew(1)
    while True:
        recall = min(_recall(searcher, vectors, some, crew) for some in sets)
        if recall >= floor or not searcher.search_harder():
            return recall


class _Checked(NamedTuple):
    """Queries [Q, D], how many neighbours each wants [Q], the score of the last of them [Q]."""

    queries: np.ndarray
    ks: np.ndarray
    worst: np.ndarray


def _recall(searcher: Searcher, vectors: np.ndarray, some: _Checked, crew: Crew) -> float:
    hits = 0
    for k in np.unique(some.ks).tolist():

        def right(mine: np.ndarray, k: int = k) -> int:
            queries, worst = some.queries[mine], some.worst[mine]
            rows, _ = searcher.propose(queries, wanted_rows(k))
            of, columns = np.nonzero(rows >= 0)
            good = exact.score(vectors, queries, of, rows[of, columns]) >= worst[of]
            return int(np.minimum(k, np.bincount(of, good, minlength=len(mine))).sum())

        mine = np.flatnonzero(some.ks == k)
        hits += sum(crew.map(right, np.array_split(mine, min(crew.threads, len(mine)))))
    return hits / int(some.ks.sum())


def canary_queries(vectors: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows of [N, D], every second one with noise of its own length."""
    rng = np.random.default_rng(0)
    sample = rng.choice(len(vectors), size=min(count, len(vectors)), replace=False)
    queries = vectors[sample].astype(np.float64)
    noise = rng.standard_normal(queries.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    queries[1::2] += noise[1::2]
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
