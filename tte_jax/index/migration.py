"""Moves a corpus's index from one place to another, while nothing serves the corpus.

The documents stay in the database, which is what the new index is made from. A migration to Milvus
remembers after every batch how far it is; interrupted, it goes on from there, also when the corpus
has been served and written in between. The corpus changes over only when every document has been
compared.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError, TteError
from tte_jax.index import consistency, location, milvus_contents, snapshots
from tte_jax.index.location import SCANN, MilvusLocation
from tte_jax.index.milvus_collection import Milvus
from tte_jax.index.milvus_contents import Marker
from tte_jax.index.recovery import SNAPSHOTS, recover

log = logging.getLogger(__name__)

_PROGRESS = "migration"
_BATCH = 1000


@dataclass(frozen=True)
class Migrated:
    """A finished migration.

    Attributes:
      source, target: where the index was and is.
      documents: how many it has.
      loaded: how many were written now; the others were by a run that was interrupted.
    """

    source: str
    target: str
    documents: int
    loaded: int


def migrate(
    store: CorpusStore,
    to: str,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch: int = _BATCH,
) -> Migrated:
    """Make the index at `to` and let the corpus be searched there from its next start on.

    Args:
      store: the corpus, opened for writing: while it is, nothing serves it.
      to: as `location.parse` takes it.
      progress: told the documents that are there and all of them, after every batch is durable.
      batch: documents between two notes of how far it is.

    Raises:
      InvalidInputError: `to` is no index.
      PreconditionError: the extra of the target is not installed.
      UnavailableError: Milvus does not answer; run it again.
      DataLossError: the new index is not what the database says; the old one stays.
    """
    source = location.remembered(store)
    target = location.parse(to)
    text = target.text if target else SCANN
    if text == source:
        return Migrated(source, text, store.count(), 0)
    old = location.parse(source)
    marker = milvus_contents.read_marker(store, old) if old else None
    if target is None:
        loaded = _to_scann(store)
    else:
        loaded = _to_milvus(store, target, progress, batch)
    # The change-over: one write. What follows only tidies up.
    location.remember(store, text)
    store.set_value(_PROGRESS, "")
    if target is not None:
        shutil.rmtree(store.path / SNAPSHOTS, ignore_errors=True)
        store.record_snapshots({})
    if old is not None and marker is not None:
        _leave(old, marker.collection)
    return Migrated(source, text, store.count(), loaded)


def _to_scann(store: CorpusStore) -> int:
    """A snapshot, from which the next start loads."""
    rows, _ = recover(store, store.path / SNAPSHOTS)
    if problems := consistency.differences(store, rows):
        raise _not_what_it_should_be(problems)
    sequence = store.sequence
    path = snapshots.write(
        store.path / SNAPSHOTS, rows, corpus_id=store.corpus_id, sequence=sequence, known={}
    )
    store.record_snapshots({sequence: snapshots.digest(path)})
    return len(rows)


def _to_milvus(
    store: CorpusStore, target: MilvusLocation, progress: Callable[[int, int], None], batch: int
) -> int:
    milvus = Milvus(target)
    try:
        profile = store.profile
        if profile is None:
            return 0
        made_of = [profile.dimension, profile.embedder_version]
        state = json.loads(store.value(_PROGRESS) or "{}")
        if not (
            state.get("to") == target.text
            and state["made_of"] == made_of
            and state["since"] >= store.horizon
            and milvus.has(state["collection"])
        ):
            name = milvus_contents.collection_name(store, 1)
            if milvus.has(name):  # left over from an earlier stay there
                milvus.drop(name)
            state = {
                "to": target.text,
                "made_of": made_of,
                "collection": name,
                "since": store.sequence,
                "after": "",
                "done": 0,
            }
        collection = milvus.collection(state["collection"], profile.dimension)
        store.set_value(_PROGRESS, json.dumps(state))
        total, loaded = store.count(), 0
        while page := store.page(state["after"], batch):
            milvus_contents.write(collection, page)
            collection.flush()
            loaded += len(page)
            state |= {"after": page[-1].id, "done": state["done"] + len(page)}
            store.set_value(_PROGRESS, json.dumps(state))
            progress(state["done"], total)
        # What was written or deleted since the migration began, by whoever served in between.
        milvus_contents.write(collection, list(store.changes_since(state["since"])))
        collection.flush()
        if problems := list(islice(milvus_contents.differences(store, collection), 1000)):
            store.set_value(_PROGRESS, "")  # the next run begins anew
            raise _not_what_it_should_be(problems)
        marker = Marker(
            collection.name, profile.dimension, profile.embedder_version, store.sequence
        )
        milvus_contents.write_marker(store, target, marker)
        return loaded
    finally:
        milvus.close()


def _leave(old: MilvusLocation, collection: str) -> None:
    """Drops the collection that served before; what cannot be reached stays there."""
    try:
        milvus = Milvus(old)
        try:
            if milvus.has(collection):
                milvus.drop(collection)
        finally:
            milvus.close()
    except TteError as error:
        log.warning("collection %s stays in %s: %s", collection, old.text, error.message)


def _not_what_it_should_be(problems: list[str]) -> DataLossError:
    return DataLossError(
        f"the new index differs from the database in {len(problems)} places; the first: "
        f"{problems[0]}. The corpus stays with its old index; run the migration again.",
        reason="MIGRATION_NOT_VERIFIED",
    )
