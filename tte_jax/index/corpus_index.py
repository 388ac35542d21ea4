"""A corpus and its live index as one object: what the index service serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.content import Document, Reasoning
from tte_jax.corpus import garbage
from tte_jax.corpus.media import LocalMedia, open_media
from tte_jax.corpus.records import CorpusProfile, Stored, validate, validate_id
from tte_jax.corpus.staging import Staging, StagingState
from tte_jax.corpus.store import BORROWED_MEDIA, MEDIA, CorpusStore
from tte_jax.errors import InvalidInputError, PreconditionError, TteError
from tte_jax.filters import Filter
from tte_jax.index import consistency, documents, location
from tte_jax.index.live import IndexConfig
from tte_jax.index.maintenance import Job, Maintenance
from tte_jax.index.milvus_index import MilvusIndex
from tte_jax.index.protocol import VectorIndex
from tte_jax.index.reports import Fetched, Found, IndexStats, RebuildReport, SnapshotReport
from tte_jax.index.scann_index import ScannIndex
from tte_jax.stages import Hit, IndexEntry, Promoted, StoredVersions

log = logging.getLogger(__name__)

# Searches that deletions overtook before one lets the writers wait.
_LOOKS = 3


class CorpusIndex:
    """Documents, vectors and search. Every method may be called from any thread.

    A write is durable in the database before it becomes visible, and visible before the call
    returns. Use `CorpusIndex.open`.

    Attributes:
      store: the database, which is the truth.
      media: the media files.
      vectors: the index that follows the database.
    """

    def __init__(
        self,
        path: Path,
        *,
        media_uri: str = "",
        config: IndexConfig | None = None,
        snapshot_every: int = 10_000,
        index: str = "",
    ) -> None:
        self.store = CorpusStore.open(path)
        try:
            media_uri = media_uri or self.store.value("media_uri") or str(path / MEDIA)
            self.media = open_media(media_uri)
            # The default moves with the directory, so only another place is remembered.
            if media_uri not in (str(path / MEDIA), self.store.value("media_uri")):
                self.store.set_value("media_uri", media_uri)
            borrowed = self.store.value(BORROWED_MEDIA)
            self._owns_media = self.media.uri.rstrip("/") != borrowed.rstrip("/")
            milvus = location.choose(self.store, index)
            self.vectors: VectorIndex = (
                ScannIndex(self.store, config=config, snapshot_every=snapshot_every)
                if milvus is None
                else MilvusIndex(self.store, milvus, snapshot_every=snapshot_every)
            )
            self.staging = Staging(self.store)
            profile = self.store.profile
            self.vectors.embedder_version = "" if profile is None else profile.embedder_version
        except BaseException:
            self.store.close()
            raise
        self._write_lock = threading.Lock()
        self._promote_lock = threading.Lock()
        # What a promotion prepared that a write then forestalled, and of which re-embedding.
        self._prepared: tuple[str, Any] | None = None
        self._closed = False
        # Only a process that died leaves garbage; listing an object store costs money.
        self._garbage_due = isinstance(self.media, LocalMedia)
        garbage_job = Job("media", lambda: self._garbage_due, self.collect_garbage)
        self.maintenance = Maintenance([*self.vectors.jobs(), garbage_job])
        self.maintenance.poke()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        media_uri: str = "",
        config: IndexConfig | None = None,
        snapshot_every: int = 10_000,
        index: str = "",
    ) -> CorpusIndex:
        """Open or create a corpus and bring its index up to date.

        Args:
          path: the corpus directory.
          media_uri: where media files are, any fsspec URI; "" = what the corpus remembers, else
            `media/` in the directory.
          config: thresholds of the index.
          snapshot_every: writes between automatic snapshots.
          index: where vectors are searched, see `location.parse`; "" = what the corpus remembers,
            else ScaNN in this process.

        Raises: as `CorpusStore.open`, and
          PreconditionError: the index is elsewhere (`INDEX_ELSEWHERE`), or needs an extra.
          UnavailableError: Milvus does not answer.
        """
        return cls(
            Path(path),
            media_uri=media_uri,
            config=config,
            snapshot_every=snapshot_every,
            index=index,
        )

    def upsert(self, entries: Sequence[IndexEntry]) -> int:
        """Store documents durably, all or nothing; returns the last entry's sequence number.

        Of several entries with one id the last wins. Media travel inside the documents' content
        and go to the media store first.

        Raises:
          InvalidInputError: a bad id, metadata value or vector.
          PreconditionError: another dimension or embedder version than the corpus has.
          StorageFullError: no space; nothing was stored.
        """
        validate(entries)
        if not entries:
            return self.store.sequence
        with self._write_lock:
            self.store.admit(entries)
            hashes = {m.sha256 for e in entries for m in e.document.content.media}
            old = self.store.media_of([e.document.id for e in entries])
            try:
                for media in (m for e in entries for m in e.document.content.media):
                    self.media.put(media.data)
                sequences = self.store.upsert_valid(entries)
            except BaseException:
                self._drop_media(hashes)
                raise
            self.vectors.apply(
                [
                    Stored(
                        sequence,
                        e.document.id,
                        np.asarray(e.vector, np.float32),
                        dict(e.document.metadata),
                    )
                    for sequence, e in zip(sequences, entries, strict=True)
                ]
            )
            # All entries have the corpus's; another one than before if the corpus was empty.
            self.vectors.embedder_version = entries[-1].embedder_version
            # Also those of an entry that a later one of the same id replaced.
            self._drop_media(old | hashes)
        self.maintenance.poke()
        return sequences[-1]

    def delete(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Delete durably; returns (deleted ids, unknown ids). Unknown ids are no error.

        Media that no other document names are deleted too, unless they are another corpus's, see
        `backup.restore`.
        """
        for i, id in enumerate(ids):
            validate_id(id, f"ids[{i}]")
        with self._write_lock:
            media = self.store.media_of(ids)
            removed, unknown = self.store.delete(ids)
            self.vectors.apply(removed)
            if self.store.profile is None:  # another embedder's queries are as good
                self.vectors.embedder_version = ""
            self._drop_media(media)
        self.maintenance.poke()
        return [r.id for r in removed], unknown

    def search(
        self,
        vector: np.ndarray,
        k: int,
        filter: Filter | None = None,
        *,
        embedder_version: str = "",
    ) -> list[Hit]:
        """At most k live documents by falling cosine, ties by id, with their reasoning.

        Args:
          vector: [D] floats; its length does not matter.
          k: at least 1.
          filter: condition on metadata.
          embedder_version: what made the vector; "" = it is not checked.

        Raises:
          InvalidInputError: k < 1, or a vector that is not finite or is zero.
          PreconditionError: another dimension or embedder than the corpus has.
        """
        vector = np.asarray(vector)
        if vector.ndim != 1 or not vector.size:
            raise InvalidInputError(
                f"the query vector must have one dimension, got shape {vector.shape}",
                field="vector",
            )
        (hits,) = self._search(
            _units(vector[None], "vector"), k, filter, embedder_version, ids_only=False
        )
        return hits

    def search_batch(
        self,
        vectors: np.ndarray,
        k: int,
        filter: Filter | None = None,
        *,
        embedder_version: str = "",
        ids_only: bool = False,
    ) -> list[list[Hit]]:
        """What `search` answers to each row of `vectors`, [Q, D] floats, in order.

        Args:
          ids_only: leave reasoning and metadata out, which need not be read then.

        Raises: as `search`.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or not vectors.size:
            raise InvalidInputError(
                f"the query vectors must be [Q, D] and not empty, got shape {vectors.shape}",
                field="vectors",
            )
        return self._search(
            _units(vectors, "vectors"), k, filter, embedder_version, ids_only=ids_only
        )

    def get(self, ids: Sequence[str]) -> list[Document | None]:
        """The documents with their media; `None` where the id is unknown. Raises as `fetch`."""
        return [None if found is None else found.document for found in self.fetch(ids)]

    def fetch(
        self, ids: Sequence[str], *, omit_media: bool = False, max_media_bytes: int | None = None
    ) -> list[Fetched | None]:
        """See `documents.fetch`."""
        return documents.fetch(
            self.store, self.media, ids, omit_media=omit_media, max_media_bytes=max_media_bytes
        )

    def existing(self, ids: Sequence[str]) -> dict[str, StoredVersions]:
        """What the documents that exist were made of; lets an ingest skip finished work."""
        return self.store.versions(ids)

    def reasonings_of(self, content_hashes: Sequence[str]) -> dict[tuple[str, str], Reasoning]:
        """See `CorpusStore.reasonings_of`; lets an ingest reason once about a content."""
        return self.store.reasonings_of(content_hashes)

    def stats(self) -> IndexStats:
        state = self.vectors.state()
        profile = self.store.profile or CorpusProfile(0, "")
        staged = self.staging.state()
        return IndexStats(
            **asdict(state),
            dimension=profile.dimension,
            embedder_version=profile.embedder_version,
            database_bytes=self.store.database_bytes() + state.bytes,
            media_bytes=self.store.media_bytes(),
            staged_embedder_version=staged.embedder_version,
            staged_documents=staged.staged,
            last_error=self.maintenance.last_error,
        )

    def snapshot(self) -> SnapshotReport:
        """See `VectorIndex.snapshot`."""
        return self.vectors.snapshot()

    def rebuild(self) -> RebuildReport:
        """See `VectorIndex.rebuild`."""
        return self.vectors.rebuild()

    def pending(
        self,
        embedder_version: str,
        *,
        limit: int,
        after: str = "",
        restart: bool = False,
        max_media_bytes: int | None = None,
    ) -> tuple[list[Document], StagingState]:
        """Documents to embed next (at most `limit`, at least one unless nothing is pending behind
        the id `after`), and how far it is. Begins the re-embedding, see `Staging.begin`.

        Args:
          max_media_bytes: fewer documents come when the media together are larger.
        """
        self.staging.begin(embedder_version, restart=restart)
        if restart:
            self._prepared = None
        ids = self.staging.pending(limit, after)
        if max_media_bytes is not None:
            rows = self.store.documents(ids)
            ids = documents.fitting([rows[id] for id in ids if id in rows], max_media_bytes)
        found = [document for document in self.get(ids) if document is not None]
        return found, self.staging.state()

    def promote(self, embedder_version: str) -> Promoted:
        """Serve the staged vectors instead of the present ones (blue/green).

        Their index is built while the old one serves; then, in one step, the database and the
        index change over. Writes wait for that step, searches do not. Where a document was written
        while the index was built, that is kept for the next call, which then takes no longer than
        the step.

        Raises:
          PreconditionError: documents are without a staged vector (`REEMBEDDING_INCOMPLETE`), the
            staged ones are of another embedder, or another promotion runs.
        """
        started = time.monotonic()
        if not self._promote_lock.acquire(blocking=False):
            raise PreconditionError(
                "the corpus is changing over to staged vectors already", reason="PROMOTE_RUNNING"
            )
        try:
            run = self.staging.check_complete(embedder_version)
            prepared, self._prepared = self._prepared, None
            if prepared is None or prepared[0] != run:
                prepared = None  # not two of them in memory
                prepared = run, self.vectors.prepare()
            with self._write_lock:
                try:
                    promoted = self.staging.promote(embedder_version, run)
                except BaseException:
                    self._prepared = prepared
                    raise
                self.vectors.exchange(prepared[1], promoted, embedder_version)
                sequence, documents = self.vectors.sequence, self.vectors.documents
        finally:
            self._promote_lock.release()
        self.maintenance.poke()
        return Promoted(sequence, documents, time.monotonic() - started)

    def collect_garbage(self) -> int:
        """Remove media files that no document names, beside serving; returns how many.

        None where the media are another corpus's, see `backup.restore`.
        """
        self._garbage_due = False
        if not self._owns_media:
            return 0
        return garbage.collect(
            self.store,
            self.media,
            lambda: self._write_lock,
            go_on=lambda: not self.maintenance.stopped,
        )

    def verify(self, *, media: bool = True) -> list[str]:
        """Compare index, database and media; returns what is wrong, empty = all agree.

        Writes wait meanwhile. `media=False` skips reading every media file.
        """
        with self._write_lock:
            return consistency.problems(
                self.store, self.vectors.differences, self.media if media else None
            )

    def close(self) -> None:
        """Wait for the background work, let the index keep what it holds, close."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
        # A searcher under construction is not worth waiting for.
        self.maintenance.stop(timeout_s=10.0)
        try:
            self.vectors.close()
        finally:
            self.store.close()

    def _search(
        self,
        queries: np.ndarray,
        k: int,
        filter: Filter | None,
        embedder_version: str,
        *,
        ids_only: bool,
    ) -> list[list[Hit]]:
        if k < 1:
            raise InvalidInputError(f"k must be at least 1, got {k}", field="k")

        def look() -> tuple[list[list[Found]], dict[str, Reasoning]]:
            found = self.vectors.search(queries, k, filter, embedder_version=embedder_version)
            if ids_only:
                return found, {}
            return found, self.store.reasonings(list({f.id for some in found for f in some}))

        found, reasonings = look()
        if self.vectors.work_due:
            self.maintenance.poke()
        if ids_only:
            return [[Hit(f.id, f.cosine) for f in some] for some in found]

        def complete() -> bool:
            return all(f.id in reasonings for some in found for f in some)

        # What is deleted between the two reads leaves a place that another document should have.
        for _ in range(_LOOKS - 1):
            if complete():
                break
            found, reasonings = look()
        if not complete():
            with self._write_lock:
                found, reasonings = look()
        return [
            [Hit(f.id, f.cosine, reasonings[f.id], dict(f.metadata)) for f in some]
            for some in found
        ]

    def _drop_media(self, hashes: set[str]) -> None:
        if not self._owns_media:
            return
        # Losing this race with a crash leaves a file nobody names: harmless, so never an error.
        try:
            for sha256 in self.store.unreferenced(sorted(hashes)) if hashes else ():
                self.media.remove(sha256)
        except (OSError, TteError) as exc:
            log.warning("unneeded media files stay behind: %s", exc)


def _units(vectors: np.ndarray, field: str) -> np.ndarray:
    """[Q, D] float32 of length one."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0.0))
    if len(bad):
        at = field if field == "vector" else f"{field}[{bad[0]}]"
        raise InvalidInputError(
            f"the query vector must be finite and not zero, its length is {norms[bad[0]]}",
            field=at,
        )
    return (vectors / norms[:, None]).astype(np.float32)
