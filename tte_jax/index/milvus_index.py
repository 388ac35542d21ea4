"""The corpus's vectors in Milvus: for more of them than one machine holds.

The database stays the truth and is written first. It remembers which collection serves and up to
which write that one is complete; a start replays what came later, and loads everything anew where
that is not possible. A write that Milvus did not take is durable all the same: until it has been
replayed, searches are refused rather than answered without it.

Milvus proposes, and proposals are scored exactly here, from the vectors that come with them; so
scores and their ties are those of `ScannIndex`. Two differences remain: a search at the moment of
a write may see a part of its batch, and recall is Milvus's own: it is measured and reported, but
nothing is done about it (`milvus-flat`, which milvus-lite gets, is exact).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tte_jax.corpus.records import Change, Stored
from tte_jax.corpus.staging import Staging
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import PreconditionError, TteError, UnavailableError
from tte_jax.filters import Filter
from tte_jax.index import exact, milvus_fields, milvus_recall
from tte_jax.index.live import check_dimension
from tte_jax.index.location import MilvusLocation
from tte_jax.index.maintenance import Job
from tte_jax.index.milvus_collection import Collection, Milvus
from tte_jax.index.milvus_contents import (
    PAGE,
    Marker,
    can_go_on,
    collection_name,
    differences,
    load,
    pages,
    read_marker,
    write,
    write_marker,
)
from tte_jax.index.reports import Found, IndexState, RebuildReport, SnapshotReport
from tte_jax.index.scann_index import check_embedder

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A collection of staged vectors; `sequences` are those of the documents they were made of."""

    collection: Collection
    sequences: dict[str, int]


class MilvusIndex:
    """A `VectorIndex` over a Milvus collection.

    Args:
      store: the corpus's database.
      location: the Milvus.
      snapshot_every: writes after which the database remembers how far the collection is.

    Raises:
      PreconditionError: the extra is not installed.
      UnavailableError: Milvus does not answer.
    """

    def __init__(
        self, store: CorpusStore, location: MilvusLocation, *, snapshot_every: int = 10_000
    ) -> None:
        self._store = store
        self._snapshot_every = snapshot_every
        self._milvus = Milvus(location)
        # Held while the collection is written or exchanged.
        self._lock = threading.RLock()
        self._rebuild_lock = threading.Lock()
        self._embedder_version = ""
        self._collection: Collection | None = None
        # The name of what `prepare` made, until it serves.
        self._prepared = ""
        self._generation = 0
        self._sequence = 0
        self._marked = 0
        self._measured: milvus_recall.Measured | None = None
        # Whether the collection may lack acknowledged writes.
        self._behind = True
        self._catch_up()

    @property
    def embedder_version(self) -> str:
        return self._embedder_version

    @embedder_version.setter
    def embedder_version(self, version: str) -> None:
        self._embedder_version = version

    @property
    def documents(self) -> int:
        return self._store.count()

    @property
    def sequence(self) -> int:
        return self._sequence

    def apply(self, changes: Sequence[Change]) -> None:
        """See `VectorIndex.apply`."""
        if not changes:
            return
        with self._lock:
            if self._behind:
                self._catch_up()
                return
            try:
                self._write(changes)
                self._sequence = max(self._sequence, changes[-1].sequence)
            except UnavailableError as error:
                self._behind = True
                raise UnavailableError(
                    f"the write is durable but cannot be searched yet: {error.message}. It will be "
                    "when Milvus answers again; sending it again is safe.",
                    reason=error.reason,
                ) from error
            except BaseException:
                self._behind = True
                raise

    def search(
        self,
        queries: np.ndarray,
        k: int,
        filter: Filter | None = None,
        *,
        embedder_version: str = "",
    ) -> list[list[Found]]:
        """See `VectorIndex.search`.

        Raises:
          UnavailableError: Milvus does not answer, or lacks writes that it cannot be given now.
        """
        if self._behind:
            self._catch_up()
        collection = self._collection
        check_embedder(self._embedder_version, embedder_version)
        if collection is None or not len(queries):
            return [[] for _ in queries]
        if queries.shape[1] != collection.dimension and self._store.profile is None:
            return [[] for _ in queries]  # the emptied collection may be of any dimension
        check_dimension(queries, collection.dimension)
        condition = milvus_fields.expression(filter) if filter is not None else ""
        found = collection.search(queries, k, condition)
        metadata = self._store.metadata_of(list({id for ids, _ in found for id in ids}))
        out: list[list[Found]] = []
        for query, (ids, vectors) in zip(queries, found, strict=True):
            # What was deleted a moment ago is in the answer but no longer in the database.
            kept = [
                i
                for i, id in enumerate(ids)
                if id in metadata and (filter is None or filter.matches(metadata[id]))
            ]
            names = [ids[i] for i in kept]
            of = np.zeros(len(kept), np.int64)
            scores = exact.score(vectors, query[None], of, np.array(kept, np.int64))
            ranked = exact.rank(scores, lambda i, names=names: names[i], k)
            out.append([Found(id, cosine, metadata[id]) for _, id, cosine in ranked])
        return out

    def state(self) -> IndexState:
        return IndexState(
            documents=self._store.count(),
            sequence=self._sequence,
            searcher=f"milvus-{self._milvus.index_type.lower()}",
            generation=self._generation,
            delta_rows=0,
            dead_rows=0,
            rebuilding=self._rebuild_lock.locked(),
            canary_recall=self._recall(),
            query_recall=1.0 if self._milvus.exact else 0.0,
            checked_queries=0,
            snapshot_sequence=self._marked,
            bytes=0,
        )

    def rebuild(self) -> RebuildReport:
        """Load everything into a new collection beside serving, and let it serve.

        Raises:
          PreconditionError: a rebuild is running already (`REBUILD_RUNNING`).
          UnavailableError: Milvus does not answer; the old collection serves on.
        """
        if not self._rebuild_lock.acquire(blocking=False):
            raise PreconditionError(
                "a rebuild of the index is running; wait until it has finished",
                reason="REBUILD_RUNNING",
            )
        try:
            began = time.monotonic()
            profile = self._store.profile
            recall = 1.0
            if profile is not None:
                since = self._store.sequence
                fresh = self._new_collection(profile.dimension)
                load(self._store, fresh)
                with self._lock:
                    write(fresh, list(self._store.changes_since(since)))
                    self._serve(fresh, self._store.sequence, profile.embedder_version)
                if not self._milvus.exact:
                    recall = self.measure_recall()
            return RebuildReport(
                self._generation,
                self.state().searcher,
                self._store.count(),
                recall,
                time.monotonic() - began,
            )
        finally:
            self._rebuild_lock.release()

    def measure_recall(self) -> float:
        """Measure the serving collection's recall and remember it, see `milvus_recall.measure`."""
        collection = self._collection
        if collection is None:
            return 1.0
        self._measured = milvus_recall.measure(self._store, collection)
        milvus_recall.remember(self._store, self._measured)
        return self._measured.recall

    def snapshot(self) -> SnapshotReport:
        """Flush, and remember that the collection holds everything up to now."""
        with self._lock:
            if self._behind:
                self._catch_up()
            if self._collection is not None:
                self._collection.flush()
                self._mark(self._sequence, self._embedder_version)
            if not self._rebuild_lock.locked():  # which replays from where it began
                self._store.forget_tombstones(self._marked)
            return SnapshotReport(self._sequence, 0)

    def prepare(self) -> Prepared | None:
        """The staged vectors in a collection of their own."""
        collection: Collection | None = None
        sequences: dict[str, int] = {}
        self._prepared = ""
        for page in pages(Staging(self._store).vectors(), PAGE):
            if collection is None:
                collection = self._new_collection(len(page[0].vector))
                self._prepared = collection.name
            now = {one.id: one.metadata for one in self._store.entries_of([s.id for s in page])}
            rows = [Stored(s.sequence, s.id, s.vector, now[s.id]) for s in page if s.id in now]
            write(collection, rows)
            sequences |= {row.id: row.sequence for row in rows}
        return None if collection is None else Prepared(collection, sequences)

    def exchange(
        self,
        prepared: Prepared | None,
        promoted: Mapping[str, tuple[int, int]],
        embedder_version: str,
    ) -> None:
        """See `VectorIndex.exchange`."""
        with self._lock:
            self._embedder_version = embedder_version
            self._behind = True  # until all of this is done
            try:
                if prepared is None:
                    self._catch_up()
                    return
                collection, sequences = prepared
                collection.remove([id for id in sequences if id not in promoted])
                changed = [
                    id for id, (before, _) in promoted.items() if sequences.get(id) != before
                ]
                for page in pages(changed, PAGE):
                    write(collection, self._store.entries_of(page))
                self._serve(collection, self._store.sequence, embedder_version)
                self._behind = False
            except TteError as error:
                # The database has changed over; the next search or write brings Milvus along.
                log.warning("the new collection is not complete yet: %s", error.message)
            finally:
                self._prepared = ""

    def jobs(self) -> Sequence[Job]:
        due = lambda: self._sequence - self._marked >= self._snapshot_every  # noqa: E731
        return (
            Job("catch up", lambda: self._behind, self._catch_up),
            Job("snapshot", due, self.snapshot),
            Job("recall", self._recall_due, self.measure_recall),
        )

    @property
    def work_due(self) -> bool:
        return self._behind

    def differences(self) -> Iterable[str]:
        """Compares every document, page by page."""
        if self._behind:
            self._catch_up()
        if self._collection is None:
            return [] if not self._store.count() else ["index: there is no collection"]
        return differences(self._store, self._collection)

    def close(self) -> None:
        """Remember how far the collection is, when Milvus still answers."""
        try:
            if not self._behind and self._sequence > self._marked:
                self.snapshot()
        except TteError as error:
            log.warning("the next start replays more than it had to: %s", error.message)
        finally:
            self._milvus.close()

    def _recall(self) -> float:
        """1 for exact search, 0 while this collection has not been measured."""
        collection, measured = self._collection, self._measured
        if collection is None or self._milvus.exact:
            return 1.0
        return measured.recall if measured and measured.collection == collection.name else 0.0

    def _recall_due(self) -> bool:
        collection = self._collection
        if collection is None or self._behind or self._milvus.exact:
            return False
        if self._measured is None or self._measured.collection != collection.name:
            self._measured = milvus_recall.remembered(self._store, collection.name)
        return self._measured is None or self._measured.outgrown(self._sequence)

    def _write(self, changes: Sequence[Change]) -> None:
        last = {change.id: change for change in changes}
        fresh = [change for change in last.values() if isinstance(change, Stored)]
        collection = self._collection
        if fresh and (collection is None or collection.dimension != len(fresh[0].vector)):
            # The corpus was empty, so that nothing else stands in the old collection.
            profile = self._store.profile
            assert profile is not None
            collection = self._new_collection(profile.dimension)
            self._serve(collection, self._sequence, profile.embedder_version)
        if collection is not None:
            write(collection, changes)

    def _catch_up(self) -> None:
        """Brings the collection to what the database says, by replay or by loading all of it."""
        with self._lock:
            if not self._behind:
                return
            profile, sequence = self._store.profile, self._store.sequence
            marker = self._marker()
            if marker is not None:
                self._generation = _number(marker.collection)
            if profile is None:
                self._collection, self._embedder_version = None, ""
                self._sequence = self._marked = sequence
                self._behind = False
                return
            usable = marker is not None and can_go_on(self._store, marker, profile, self._milvus)
            if marker is not None and usable:
                collection = self._milvus.collection(marker.collection, marker.dimension)
                for page in pages(self._store.changes_since(marker.sequence), PAGE):
                    write(collection, page)
                if collection.count() == self._store.count():
                    self._collection, self._marked = collection, marker.sequence
                else:
                    log.warning(
                        "collection %s has %d documents, the database %d: loading all of them",
                        marker.collection, collection.count(), self._store.count(),
                    )  # fmt: skip
                    usable = False
            if not usable:
                collection = self._new_collection(profile.dimension)
                load(self._store, collection)
                self._serve(collection, sequence, profile.embedder_version)
            self._sequence = sequence
            self._embedder_version = profile.embedder_version
            self._behind = False

    def _serve(self, collection: Collection, sequence: int, embedder_version: str) -> None:
        """Lets a complete collection serve from now on, and drops the one before."""
        before = self._marker()
        old = before.collection if before else ""
        collection.flush()
        self._collection = collection
        self._generation = _number(collection.name)
        self._sequence = sequence
        self._mark(sequence, embedder_version)
        if old and old != collection.name and self._milvus.has(old):
            self._milvus.drop(old)

    def _new_collection(self, dimension: int) -> Collection:
        number = self._generation + 1
        serving = self._collection.name if self._collection is not None else ""
        while self._milvus.has(name := collection_name(self._store, number)):
            if name in (serving, self._prepared):
                number += 1
                continue
            # Left over from something that was interrupted.
            self._milvus.drop(name)
        return self._milvus.collection(name, dimension)

    def _marker(self) -> Marker | None:
        return read_marker(self._store, self._milvus.location)

    def _mark(self, sequence: int, embedder_version: str) -> None:
        assert self._collection is not None
        marker = Marker(
            self._collection.name, self._collection.dimension, embedder_version, sequence
        )
        write_marker(self._store, self._milvus.location, marker)
        self._marked = sequence


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
