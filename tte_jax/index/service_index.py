"""A corpus and its live index as one object: what the index service serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tte_jax.content import Content, Document, Media, Text
from tte_jax.corpus import garbage
from tte_jax.corpus.media import LocalMedia, open_media
from tte_jax.corpus.records import (
    CorpusProfile,
    MediaRef,
    Stored,
    StoredDocument,
    validate,
    validate_id,
)
from tte_jax.corpus.staging import Staging, StagingState
from tte_jax.corpus.store import MEDIA, CorpusStore
from tte_jax.errors import DataLossError, InvalidInputError, PreconditionError, TteError
from tte_jax.filters import Filter
from tte_jax.index import consistency, reembedding, snapshots
from tte_jax.index.live import IndexConfig, LiveIndex, RebuildReport
from tte_jax.index.maintenance import Job, Maintenance
from tte_jax.index.recovery import SNAPSHOTS, recover
from tte_jax.index.reports import Fetched, IndexStats, SnapshotReport
from tte_jax.stages import Hit, IndexEntry, Promoted, StoredVersions

log = logging.getLogger(__name__)


class CorpusIndex:
    """Documents, vectors and search. Every method may be called from any thread.

    A write is durable in the database before it becomes visible, and visible before the call
    returns. Use `CorpusIndex.open`.
    """

    def __init__(
        self,
        path: Path,
        *,
        media_uri: str = "",
        config: IndexConfig | None = None,
        snapshot_every: int = 10_000,
    ) -> None:
        self.store = CorpusStore.open(path)
        try:
            self._snapshots = path / SNAPSHOTS
            self._snapshot_every = snapshot_every
            media_uri = media_uri or self.store.value("media_uri") or str(path / MEDIA)
            self.media = open_media(media_uri)
            # The default moves with the directory, so only another place is remembered.
            if media_uri not in (str(path / MEDIA), self.store.value("media_uri")):
                self.store.set_value("media_uri", media_uri)
            rows, self._snapshot_sequence = recover(self.store, self._snapshots)
            self.live = LiveIndex(rows, sequence=self.store.sequence, config=config)
            self.staging = Staging(self.store)
            self._note_embedder()
        except BaseException:
            self.store.close()
            raise
        self._write_lock = threading.Lock()
        self._snapshot_lock = threading.Lock()
        self._promote_lock = threading.Lock()
        self._closed = False
        # Only a process that died leaves garbage; listing an object store costs money.
        self._garbage_due = isinstance(self.media, LocalMedia)
        self.maintenance = Maintenance(
            [
                Job("rebuild", self._rebuild_due, self._rebuild_if_free),
                Job("snapshot", self._snapshot_due, self.snapshot),
                Job("recall", self._recall_due, lambda: self.live.measure_recall()),
                Job("rebuild", self._rebuild_due, self._rebuild_if_free),
                Job("media", lambda: self._garbage_due, self.collect_garbage),
            ]
        )
        self.maintenance.poke()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        media_uri: str = "",
        config: IndexConfig | None = None,
        snapshot_every: int = 10_000,
    ) -> CorpusIndex:
        """Open or create a corpus and bring its index up to date.

        Args:
          path: the corpus directory.
          media_uri: where media files are, any fsspec URI; "" = what the corpus remembers, else
            `media/` in the directory.
          config: thresholds of the index.
          snapshot_every: writes between automatic snapshots.

        Raises: as `CorpusStore.open`.
        """
        return cls(Path(path), media_uri=media_uri, config=config, snapshot_every=snapshot_every)

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
                sequences = self.store.upsert(entries)
            except BaseException:
                self._drop_media(hashes)
                raise
            self.live.apply(
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
            if self.live.view.live == len({e.document.id for e in entries}):
                self._note_embedder()  # perhaps another one than before the corpus was empty
            self._drop_media(old)
        self.maintenance.poke()
        return sequences[-1]

    def delete(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Delete durably; returns (deleted ids, unknown ids). Unknown ids are no error.

        Media that no other document names are deleted too.
        """
        for i, id in enumerate(ids):
            validate_id(id, f"ids[{i}]")
        with self._write_lock:
            media = self.store.media_of(ids)
            removed, unknown = self.store.delete(ids)
            self.live.apply(removed)
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
        query = _unit(vector)
        if k < 1:
            raise InvalidInputError(f"k must be at least 1, got {k}", field="k")
        live = self.live
        if embedder_version and live.embedder_version not in ("", embedder_version):
            raise PreconditionError(
                f"the query was embedded by {embedder_version!r}; this corpus holds vectors of "
                f"{live.embedder_version!r}, and the two cannot be compared. Embed the query with "
                "the corpus's embedder, or re-embed the corpus (`tte corpus reembed`).",
                reason="EMBEDDER_MISMATCH",
                expected=live.embedder_version,
                actual=embedder_version,
            )
        found = live.search(query, k, filter)
        if live.queries.due:
            self.maintenance.poke()
        reasonings = self.store.reasonings([f.id for f in found])
        if len(reasonings) < len(found):
            # Deleted between the two reads: look again, so that others can fill the places.
            found = live.search(query, k, filter)
            reasonings = self.store.reasonings([f.id for f in found])
        return [
            Hit(f.id, f.cosine, reasonings[f.id], dict(f.metadata))
            for f in found
            if f.id in reasonings
        ]

    def get(self, ids: Sequence[str]) -> list[Document | None]:
        """The documents with their media; `None` where the id is unknown. Raises as `fetch`."""
        return [None if found is None else found.document for found in self.fetch(ids)]

    def fetch(
        self, ids: Sequence[str], *, omit_media: bool = False, max_media_bytes: int | None = None
    ) -> list[Fetched | None]:
        """The documents and what they were made of; `None` where the id is unknown.

        Args:
          ids: document ids.
          omit_media: leave media parts out and read no media file.
          max_media_bytes: refuse when the media together are larger.

        Raises:
          InvalidInputError: more media than `max_media_bytes` (`RESPONSE_TOO_LARGE`).
          DataLossError: a media file is missing or damaged.
        """
        for i, id in enumerate(ids):
            validate_id(id, f"ids[{i}]")
        rows = self.store.documents(ids)
        if max_media_bytes is not None and not omit_media:
            _limit_media([rows[id] for id in ids if id in rows], max_media_bytes)
        out: list[Fetched | None] = []
        for id in ids:
            row = rows.get(id)
            try:
                out.append(None if row is None else self._fetched(row, omit_media))
            except DataLossError:
                # A delete or a replacement since the row was read takes its media along.
                now = self.store.documents([id]).get(id)
                if now is not None and row is not None and now.sequence == row.sequence:
                    raise
                out.append(None if now is None else self._fetched(now, omit_media))
        return out

    def existing(self, ids: Sequence[str]) -> dict[str, StoredVersions]:
        """What the documents that exist were made of; lets an ingest skip finished work."""
        return self.store.versions(ids)

    def stats(self) -> IndexStats:
        live = self.live
        view = live.view
        profile = self.store.profile or CorpusProfile(0, "")
        staged = self.staging.state()
        generation = view.generation
        delta_live = int(view.delta_alive.sum())
        measured = live.query_recall
        return IndexStats(
            documents=view.live,
            sequence=view.sequence,
            dimension=profile.dimension,
            embedder_version=profile.embedder_version,
            searcher=generation.searcher.kind if generation.searcher else "exact",
            generation=generation.number,
            delta_rows=delta_live,
            dead_rows=len(view.alive) + len(view.delta_alive) - view.live,
            rebuilding=self.live.rebuilding,
            canary_recall=generation.recall,
            query_recall=measured.recall,
            checked_queries=measured.queries,
            snapshot_sequence=self._snapshot_sequence,
            database_bytes=self.store.database_bytes()
            + sum(snapshots.size(path) for path in snapshots.listed(self._snapshots)),
            media_bytes=self.store.media_bytes(),
            staged_embedder_version=staged.embedder_version,
            staged_documents=staged.staged,
            last_error=self.maintenance.last_error,
        )

    def snapshot(self) -> SnapshotReport:
        """Write a snapshot beside serving.

        Raises:
          StorageFullError: no space; the older snapshots still stand.
        """
        with self._snapshot_lock:
            view = self.live.view
            known = self.store.snapshot_digests()
            path = snapshots.write(
                self._snapshots,
                view.gather(),
                corpus_id=self.store.corpus_id,
                sequence=view.sequence,
                known=known,
            )
            self._snapshot_sequence = view.sequence
            known[view.sequence] = snapshots.digest(path)
            there = {int(p.name) for p in snapshots.listed(self._snapshots)}
            kept = {number: digest for number, digest in known.items() if number in there}
            self.store.record_snapshots(kept)
            # Replay from the oldest snapshot kept must stay possible.
            self.store.forget_tombstones(min(kept))
            return SnapshotReport(view.sequence, snapshots.size(path))

    def rebuild(self) -> RebuildReport:
        """Build a new generation beside serving, check its recall, swap it in.

        Raises: as `LiveIndex.rebuild`.
        """
        return self.live.rebuild()

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
        ids = self.staging.pending(limit, after)
        if max_media_bytes is not None:
            rows = self.store.documents(ids)
            ids = _fitting([rows[id] for id in ids if id in rows], max_media_bytes)
        documents = [found for found in self.get(ids) if found is not None]
        return documents, self.staging.state()

    def promote(self, embedder_version: str) -> Promoted:
        """Serve the staged vectors instead of the present ones (blue/green).

        Their index is built while the old one serves; then, in one step, the database and the
        index change over. Writes wait for that step, searches do not.

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
            self.staging.check_complete(embedder_version)
            number = self.live.view.generation.number + 1
            green = reembedding.build(self.store, number=number, config=self.live.config)
            with self._write_lock:
                promoted = self.staging.promote(embedder_version)
                try:
                    live = reembedding.exchange(self.store, green, promoted, self.live.config)
                except Exception:
                    # The database has changed over: serve what it says, however it is made.
                    log.exception("the prepared index cannot be used; reading all vectors")
                    rows, _ = recover(self.store, self._snapshots)
                    live = LiveIndex(rows, sequence=self.store.sequence, config=self.live.config)
                live.embedder_version = embedder_version
                self.live = live
        finally:
            self._promote_lock.release()
        self.maintenance.poke()
        return Promoted(live.view.sequence, live.view.live, time.monotonic() - started)

    def collect_garbage(self) -> int:
        """Remove media files that no document names, beside serving; returns how many."""
        self._garbage_due = False
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
            rows = self.live.view.gather()
            return consistency.problems(self.store, rows, self.media if media else None)

    def close(self) -> None:
        """Wait for the background work, snapshot if many writes happened since, close."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
        # A searcher under construction is not worth waiting for.
        self.maintenance.stop(timeout_s=10.0)
        try:
            if self._snapshot_due():
                self.snapshot()
        finally:
            self.store.close()

    def _fetched(self, row: StoredDocument, omit_media: bool) -> Fetched:
        parts = tuple(
            part
            if isinstance(part, Text)
            else Media(self.media.get(part.sha256), part.kind, part.page)
            for part in row.parts
            if isinstance(part, Text) or not omit_media
        )
        return Fetched(
            Document(row.id, Content(parts), row.metadata, row.reasoning, row.sequence),
            StoredVersions(
                row.content_hash, row.reasoner_version, row.embedder_version, row.metadata
            ),
        )

    def _drop_media(self, hashes: set[str]) -> None:
        # Losing this race with a crash leaves a file nobody names: harmless, so never an error.
        try:
            for sha256 in self.store.unreferenced(sorted(hashes)) if hashes else ():
                self.media.remove(sha256)
        except (OSError, TteError) as exc:
            log.warning("unneeded media files stay behind: %s", exc)

    def _note_embedder(self) -> None:
        profile = self.store.profile
        self.live.embedder_version = "" if profile is None else profile.embedder_version

    def _rebuild_due(self) -> bool:
        return self.live.needs_rebuild() and not self.live.rebuilding

    def _rebuild_if_free(self) -> None:
        try:
            self.live.rebuild()
        except PreconditionError as exc:
            if exc.reason != "REBUILD_RUNNING":
                raise

    def _recall_due(self) -> bool:
        return self.live.needs_recall_check()

    def _snapshot_due(self) -> bool:
        return self.live.view.sequence - self._snapshot_sequence >= self._snapshot_every


def _fitting(rows: Sequence[StoredDocument], limit: int) -> list[str]:
    """Ids of the first rows, at least one, whose texts and media have at most `limit` bytes."""
    ids: list[str] = []
    for row in rows:
        limit -= sum(p.size if isinstance(p, MediaRef) else 4 * len(p.text) for p in row.parts)
        limit -= 4 * len(row.reasoning.text) * 3
        if ids and limit < 0:
            break
        ids.append(row.id)
    return ids


def _limit_media(rows: Sequence[StoredDocument], limit: int) -> None:
    total = sum(part.size for row in rows for part in row.parts if isinstance(part, MediaRef))
    if total > limit:
        raise InvalidInputError(
            f"the media of these {len(rows)} documents have {total} bytes, more than the "
            f"{limit} that one answer holds. Ask for fewer ids, or leave the media out.",
            field="ids",
            reason="RESPONSE_TOO_LARGE",
        )


def _unit(vector: np.ndarray) -> np.ndarray:
    vector = np.asarray(vector, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise InvalidInputError(
            f"the query vector must have one dimension, got shape {vector.shape}", field="vector"
        )
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm == 0.0:
        raise InvalidInputError(
            f"the query vector must be finite and not zero, its length is {norm}", field="vector"
        )
    return (vector / norm).astype(np.float32)
