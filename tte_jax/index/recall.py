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
from tte_jax.index.protocol import Searcher

# What users see, and what the first stage asks for. A filter that keeps a fifth of the rows makes
# ten answers as deep a search as fifty without one.
CANARY_KS = (10, 50)
OVERFETCH = 2.0
OVERFETCH_ROWS = 50


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

    def note(self, asked: Asked) -> None:
        with self._lock:
            self._last.append(asked)
            self._since_check += 1

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
    return math.ceil(OVERFETCH * k / share) + OVERFETCH_ROWS


def worst_true_score(
    vectors: np.ndarray, query: np.ndarray, k: int, rows: np.ndarray | None = None
) -> float:
    """The k-th best score among `rows`: any row that reaches it is a right answer, ties too."""
    scores = exact.score(vectors, query, exact.propose(vectors, query, k, rows))
    return float(np.sort(scores)[-min(k, len(scores))])


def check_recall(
    searcher: Searcher,
    vectors: np.ndarray,
    canaries: int,
    floor: float,
    asked: Sequence[Asked] = (),
) -> float:
    """Recall of `searcher` against exact search: the lowest of recall@10 and recall@50 on canaries
    and of the recall on real queries.

    Half of the canaries are rows, half are rows with noise of equal length added: queries (a text
    looking for an image, say) lie off the documents, where a tree misses more. Below `floor` the
    searcher is made to search harder, step by step, while it can.

    Args:
      vectors: [N, D] float32, the searcher's rows.
      canaries: how many; each counts with 10 neighbours and with 50, apart.
      floor: the recall to reach.
      asked: real queries, each with the k it was asked with; filters play no part here.
    """
    invented = _canaries(vectors, canaries)
    sets = [
        [(a, worst_true_score(vectors, a.vector, min(a.k, len(vectors)))) for a in some]
        for some in ([*asked], *([Asked(query, k) for query in invented] for k in CANARY_KS))
        if some
    ]
    while True:
        recall = min(_recall(searcher, vectors, some) for some in sets)
        if recall >= floor or not searcher.search_harder():
            return recall


def _recall(
    searcher: Searcher, vectors: np.ndarray, queries: Sequence[tuple[Asked, float]]
) -> float:
    hits = wanted = 0
    for asked, worst in queries:
        k = min(asked.k, len(vectors))
        found = searcher.propose(asked.vector, wanted_rows(k))
        hits += min(k, int((exact.score(vectors, asked.vector, found) >= worst).sum()))
        wanted += k
    return hits / wanted


def _canaries(vectors: np.ndarray, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    sample = rng.choice(len(vectors), size=min(count, len(vectors)), replace=False)
    queries = vectors[sample].astype(np.float64)
    noise = rng.standard_normal(queries.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    queries[1::2] += noise[1::2]
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
