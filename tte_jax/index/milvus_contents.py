"""What a Milvus collection should hold, what it holds, and what the database remembers of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple, TypeVar

import numpy as np

from tte_jax.corpus.records import Change, CorpusProfile, Removed, Stored
from tte_jax.corpus.store import CorpusStore
from tte_jax.index import milvus_fields
from tte_jax.index.location import MilvusLocation
from tte_jax.index.milvus_collection import Collection, Milvus, batches

T = TypeVar("T")

PAGE = 500
_MARKER = "milvus"


class Marker(NamedTuple):
    """What the database remembers: the collection that serves, and what is in it for certain."""

    collection: str
    dimension: int
    embedder_version: str
    sequence: int


def collection_name(store: CorpusStore, number: int) -> str:
    return f"tte_{store.corpus_id}_{number}"


def read_marker(store: CorpusStore, location: MilvusLocation) -> Marker | None:
    """What the database remembers of this Milvus; `None` when it is nothing."""
    kept = json.loads(store.value(_MARKER) or "{}")
    if kept.pop("location", "") != location.text:
        return None
    return Marker(**kept)


def write_marker(store: CorpusStore, location: MilvusLocation, marker: Marker) -> None:
    store.set_value(_MARKER, json.dumps({"location": location.text} | marker._asdict()))


def can_go_on(store: CorpusStore, marker: Marker, profile: CorpusProfile, milvus: Milvus) -> bool:
    """Whether the collection that the database remembers can be brought up to date by replay."""
    return (
        marker.dimension == profile.dimension
        and marker.embedder_version == profile.embedder_version
        and marker.sequence >= store.horizon
        and milvus.has(marker.collection)
    )


def write(collection: Collection, changes: Sequence[Change]) -> None:
    """Brings a collection to the last state that `changes` have of each document."""
    last = {change.id: change for change in changes}
    collection.remove([id for id, change in last.items() if isinstance(change, Removed)])
    fresh = [change for change in last.values() if isinstance(change, Stored)]
    for page in pages(fresh, batches(collection.dimension)):
        collection.put(page)


def load(store: CorpusStore, collection: Collection, after: str = "") -> None:
    """Writes every document of greater id than `after`, in order of id."""
    while page := store.page(after, PAGE):
        write(collection, page)
        after = page[-1].id


def differences(
    store: CorpusStore, collection: Collection, besides: Set[str] = frozenset()
) -> Iterator[str]:
    """What differs between the database and a collection, one sentence each.

    Args:
      besides: ids that are not compared.
    """
    after, known_there = "", 0
    while page := store.page(after, PAGE):
        after = page[-1].id
        compared = [document for document in page if document.id not in besides]
        there = collection.get([document.id for document in compared])
        known_there += len(there)
        for document in compared:
            found = there.get(document.id)
            if found is None:
                yield f"document {document.id!r} is missing from the index"
            elif not np.array_equal(found[0], document.vector):
                yield f"document {document.id!r} has another vector in the index"
            elif found[1] != milvus_fields.encode(document.metadata):
                yield f"document {document.id!r} has other metadata in the index"
    for ids in pages(besides, PAGE):
        known_there += len(collection.get(ids))
    if collection.count() == known_there:
        return
    for page in pages(collection.ids(), PAGE):
        known = store.metadata_of(page)
        yield from (
            f"index: {id!r} is not in the database"
            for id in page
            if id not in known and id not in besides
        )


def differences_at_rest(store: CorpusStore, location: MilvusLocation) -> Iterator[str]:
    """`differences` of a corpus that nobody serves, but for what the next start will replay.

    Raises:
      PreconditionError: the extra is not installed.
      UnavailableError: Milvus does not answer.
    """
    profile, marker = store.profile, read_marker(store, location)
    if profile is None:
        return
    milvus = Milvus(location)
    try:
        if marker is None or not can_go_on(store, marker, profile, milvus):
            yield (
                f"index: {location.text} has no collection of this corpus that could be brought up "
                f"to date; the next start loads all {store.count()} documents into a new one"
            )
            return
        collection = milvus.collection(marker.collection, marker.dimension)
        replayed = {change.id for change in store.changes_since(marker.sequence)}
        yield from differences(store, collection, replayed)
    finally:
        milvus.close()


def pages(items: Iterable[T], size: int) -> Iterable[list[T]]:
    page: list[T] = []
    for item in items:
        page.append(item)
        if len(page) == size:
            yield page
            page = []
    if page:
        yield page
