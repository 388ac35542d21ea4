"""How much of the truth a Milvus collection finds, measured against the database.

The exact answers come from one pass over the database's vectors, page by page, so that memory does
not grow with the corpus. That is as much reading as loading the collection was, hence it is done
once for a collection, and again when as many writes have happened as it had documents.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from tte_jax.corpus.store import CorpusStore
from tte_jax.index import exact
from tte_jax.index.milvus_collection import Collection
from tte_jax.index.recall import CANARY_KS, canary_queries

_KEPT = "milvus_recall"
_CANARIES = 256
_PAGE = 5000
# Writes before a small corpus is measured again.
_LEAST_WRITES = 1000


class Measured(NamedTuple):
    """The lower of recall@10 and recall@50, 0 to 1, of a collection that held `documents` after the
    write `sequence`."""

    collection: str
    sequence: int
    documents: int
    recall: float

    def outgrown(self, sequence: int) -> bool:
        """Whether so much was written since that it should be measured again."""
        return sequence - self.sequence > max(_LEAST_WRITES, self.documents)


def measure(store: CorpusStore, collection: Collection) -> Measured:
    """Ask the collection for the neighbours of 256 canaries (`recall.canary_queries`) and count
    those that a pass over the database confirms. Writes meanwhile may move the figure by their
    share.

    Raises:
      UnavailableError: Milvus does not answer.
    """
    sequence = store.sequence
    sample = store.sample(_CANARIES)
    if not sample:
        return Measured(collection.name, sequence, 0, 1.0)
    queries = canary_queries(np.stack([one.vector for one in sample]), _CANARIES)
    documents, best = _best_scores(store, queries, max(CANARY_KS))
    recalls: list[float] = []
    for k in CANARY_KS:
        k = min(k, best.shape[1])
        right = 0
        for query, worst, (_, vectors) in zip(
            queries, best[:, k - 1], collection.search(queries, k, ""), strict=True
        ):
            right += min(k, int((vectors @ query >= worst - exact.SLACK).sum()))
        recalls.append(right / (k * len(queries)))
    return Measured(collection.name, sequence, documents, min(recalls))


def remembered(store: CorpusStore, collection: str) -> Measured | None:
    """The last measurement of this collection; `None` when it was never measured."""
    kept = json.loads(store.value(_KEPT) or "{}")
    return Measured(**kept) if kept.get("collection") == collection else None


def remember(store: CorpusStore, measured: Measured) -> None:
    store.set_value(_KEPT, json.dumps(measured._asdict()))


def _best_scores(store: CorpusStore, queries: np.ndarray, k: int) -> tuple[int, np.ndarray]:
    """How many documents there are, and their best scores, falling: [Q, min(k, documents)]."""
    best = np.zeros((len(queries), 0), np.float32)
    documents, after = 0, ""
    while page := store.page(after, _PAGE):
        documents, after = documents + len(page), page[-1].id
        scores = queries @ np.stack([one.vector for one in page]).T
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :k]
    return documents, best
