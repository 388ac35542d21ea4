"""The documents nearest to each query of a training set, within its own data set.

Small data sets are searched exactly, larger ones by the index that serves (ScaNN, checked against
canaries); either way scores are exact and ties go by the document's key.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from training.mining.table import Table
from tte_jax.corpus.durable import write_atomically
from tte_jax.index import IndexConfig, LiveIndex
from tte_jax.index.generation import Rows

NONE = -1


def nearest(
    table: Table,
    queries: np.ndarray,
    documents: np.ndarray,
    *,
    count: int = 100,
    config: IndexConfig | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest documents of each query, right ones included.

    Args:
      queries, documents: [Q, D] and [N, D] float32, L2-normalised.

    Returns:
      ([Q, count] int32 numbers into `table.documents`, nearest first, `NONE` where there are
      fewer; [Q, count] float32 cosines, 0 there).
    """
    found = np.full((len(table.queries), count), NONE, np.int32)
    cosines = np.zeros(found.shape, np.float32)
    of_query = np.array([q.dataset for q in table.queries])
    of_document = np.array([d.dataset for d in table.documents])
    for dataset in range(len(table.datasets)):
        members = np.flatnonzero(of_document == dataset)
        keys = [table.documents[i].key for i in members]
        number_of = dict(zip(keys, members.tolist(), strict=True))
        rows = Rows(
            keys,
            np.ascontiguousarray(documents[members]),
            np.zeros(len(members), np.int64),
            [{}] * len(members),
        )
        index = LiveIndex(rows, config=config)
        if index.needs_rebuild():
            index.rebuild()
        for query in np.flatnonzero(of_query == dataset):
            for place, one in enumerate(index.search(queries[query], count)):
                found[query, place] = number_of[one.id]
                cosines[query, place] = one.cosine
    return found, cosines


def save(path: Path, found: np.ndarray, cosines: np.ndarray) -> None:
    """Both in one file, whole or not at all: a round is mined from what was written first."""
    width = found.shape[1]
    both = np.zeros(len(found), [("document", "<i4", (width,)), ("cosine", "<f4", (width,))])
    both["document"], both["cosine"] = found, cosines
    out = io.BytesIO()
    np.save(out, both)
    write_atomically(path, out.getvalue())


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest` returned them."""
    both = np.load(path, allow_pickle=False)
    return both["document"], both["cosine"]
