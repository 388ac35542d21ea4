"""Does the index say what the database says?"""

from __future__ import annotations

import numpy as np

from tte_jax.corpus.media import MediaStore
from tte_jax.corpus.records import Removed
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError
from tte_jax.index.generation import Rows


def problems(store: CorpusStore, rows: Rows, media: MediaStore | None) -> list[str]:
    """What differs between the database and the index's live rows; empty = nothing.

    Args:
      store: the truth.
      rows: the live rows of the index.
      media: also read every media file that a document names and check its hash.
    """
    found = [f"database: {line}" for line in store.integrity()]
    indexed = {id: i for i, id in enumerate(rows.ids)}
    if len(indexed) != len(rows):
        found.append(f"index: {len(rows) - len(indexed)} ids stand in it twice")
    for change in store.changes_since(0):
        if isinstance(change, Removed):
            continue
        row = indexed.pop(change.id, None)
        if row is None:
            found.append(f"document {change.id!r} is missing from the index")
        elif int(rows.sequences[row]) != change.sequence:
            found.append(f"document {change.id!r} is stale in the index")
        elif not np.array_equal(rows.vectors[row], change.vector):
            found.append(f"document {change.id!r} has another vector in the index")
        elif rows.metadata[row] != change.metadata:
            found.append(f"document {change.id!r} has other metadata in the index")
    found += [f"index: {id!r} is not in the database" for id in indexed]
    if media is None:
        return found
    for sha256 in sorted(store.all_media()):
        try:
            media.get(sha256)
        except DataLossError as exc:
            found.append(exc.message)
    return found
