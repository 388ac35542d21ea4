"""Does the index say what the database says?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from tte_jax.corpus.backup import media_of
from tte_jax.corpus.checks import database_problems, media_problems
from tte_jax.corpus.media import MediaStore
from tte_jax.corpus.records import Removed
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError, UnavailableError
from tte_jax.index import location
from tte_jax.index.generation import Rows
from tte_jax.index.milvus_contents import differences_at_rest
from tte_jax.index.recovery import SNAPSHOTS, recover


def problems(
    store: CorpusStore, differences: Callable[[], Iterable[str]], media: MediaStore | None
) -> list[str]:
    """What is wrong with the database, the index and the media; empty = nothing.

    Args:
      store: the truth.
      differences: says what differs between the database and the index.
      media: also read every media file that a document names and check its hash.
    """
    found = list(database_problems(store))
    try:
        found += differences()
    except DataLossError as exc:
        if exc.message not in found:
            found.append(exc.message)
    if media is not None:
        found += media_problems(store, media)
    return found


def differences(store: CorpusStore, rows: Rows) -> list[str]:
    """What differs between the database and the live rows of an index in memory."""
    found: list[str] = []
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
    return found + [f"index: {id!r} is not in the database" for id in indexed]


def problems_at_rest(path: Path, *, media: bool = True, backup: bool = False) -> list[str]:
    """What is wrong with a corpus that nobody serves: database, media, and its index: what the
    next start would make of its snapshots, or its Milvus collection.

    Args:
      media: also read every media file.
      backup: it is a backup, which no Milvus collection belongs to.

    Raises:
      NotFoundError: there is no corpus.
      PreconditionError: another version of this program made it, or the index's extra is not
        installed.
    """
    with closing(CorpusStore.open(path, read_only=True)) as store:
        files = media_of(store) if media else None
        milvus = location.parse(location.remembered(store))
        if milvus is not None and not backup:
            try:
                return problems(store, lambda: differences_at_rest(store, milvus), files)
            except UnavailableError as exc:
                return [*problems(store, list, files), f"the index was not compared: {exc.message}"]
        try:
            rows, _ = recover(store, path / SNAPSHOTS)
        except DataLossError as exc:
            # The index cannot even be made; what the database says of itself says more.
            return list(dict.fromkeys([*database_problems(store), exc.message]))
        return problems(store, lambda: differences(store, rows), files)
