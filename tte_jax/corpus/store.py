"""The corpus in SQLite: documents, reasoning, vectors and an op-log with sequence numbers.

Every batch is one transaction in WAL mode with `synchronous=FULL`: when a call returns, its rows
survive `kill -9` and power loss. The sequence number counts writes; it only grows, and numbers of
deleted documents are never given out again, so "everything after sequence s" is a full replay.
"""

from __future__ import annotations

import contextlib
import json
import queue
import random
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tte_jax.content import Metadata, Reasoning
from tte_jax.corpus import rows, schema
from tte_jax.corpus.durable import fsync_directory
from tte_jax.corpus.faults import not_writable, translated
from tte_jax.corpus.lock import WriterLock
from tte_jax.corpus.records import (
    Change,
    CorpusProfile,
    MediaRef,
    Removed,
    Stored,
    StoredDocument,
    decode_all_metadata,
    decode_metadata,
    decode_parts,
    decode_vector,
    validate,
)
from tte_jax.errors import NotFoundError, UnavailableError
from tte_jax.stages import IndexEntry, StoredVersions

__all__ = [
    "Change",
    "CorpusProfile",
    "CorpusStore",
    "MediaRef",
    "Removed",
    "Stored",
    "StoredDocument",
]

DATABASE = "corpus.sqlite3"
MEDIA = "media"
LOCK = "corpus.lock"
BORROWED_MEDIA = "borrowed_media"
"""Where the corpus may read media but not remove any: they are another corpus's (`restore`)."""
_SNAPSHOTS = "snapshots"
_PAGE = 1000


class CorpusStore:
    """One corpus directory. Reads may come from any thread; writes are serialised.

    Use `CorpusStore.open`. A store opened with `read_only=True` takes no lock and can look at a
    corpus that another process is serving.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._file = path / DATABASE
        self._write_lock = threading.RLock()
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._closed = False
        self._lock: WriterLock | None = None
        self._writer: sqlite3.Connection | None = None
        if read_only:
            if not self._file.is_file():
                raise NotFoundError(f"there is no corpus in {path}: {DATABASE} is missing")
            with translated(self._file), self.reader() as db:
                schema.check(db, where=self._file, may_migrate=False)
            return
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(path / LOCK)
        try:
            with translated(self._file):
                self._writer = self._connect(f"file:{_quoted(self._file)}")
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = FULL")
                schema.prepare(self._writer, where=self._file)
                fsync_directory(path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> CorpusStore:
        """Open or create a corpus.

        Raises:
          PreconditionError: it is open for writing elsewhere, was made by a newer version, or
            cannot be written.
          DataLossError: the database is damaged or no corpus.
          NotFoundError: `read_only` and there is no corpus.
        """
        return cls(Path(path), read_only=read_only)

    def close(self) -> None:
        """Close every connection and release the lock; calling it again does nothing."""
        with self._write_lock:
            self._closed = True
            while True:
                try:
                    self._readers.get_nowait().close()
                except queue.Empty:
                    break
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # Writing

    def upsert(self, entries: Sequence[IndexEntry]) -> list[int]:
        """Insert or replace documents, all or nothing; a later entry of the same id wins.

        The media must be in the media store already. Returns one sequence number per entry.

        Raises:
          InvalidInputError: see `records.validate`.
          PreconditionError: a vector's dimension or embedder version is not the corpus's, or the
            corpus cannot be written.
          StorageFullError: no disk space; nothing was stored.
        """
        validate(entries)
        return self.upsert_valid(entries)

    def upsert_valid(self, entries: Sequence[IndexEntry]) -> list[int]:
        """`upsert` of what has passed `records.validate`."""
        with self.transaction() as db:
            rows.admit(db, entries)
            sequence = rows.number(db, "sequence")
            sequences: list[int] = []
            for entry in entries:
                sequence += 1
                sequences.append(sequence)
                rows.put(db, entry, sequence)
            rows.set_value(db, "sequence", sequence)
        return sequences

    def admit(self, entries: Sequence[IndexEntry]) -> None:
        """Raise `PreconditionError` if `upsert` would refuse the vectors; stores nothing."""
        with self.reader() as db:
            rows.admit(db, entries)

    def delete(self, ids: Sequence[str]) -> tuple[list[Removed], list[str]]:
        """Delete documents, all in one transaction; returns (removed, unknown ids)."""
        removed: list[Removed] = []
        unknown: list[str] = []
        with self.transaction() as db:
            sequence = rows.number(db, "sequence")
            for id in dict.fromkeys(ids):
                if db.execute("DELETE FROM documents WHERE id = ?", (id,)).rowcount == 0:
                    unknown.append(id)
                    continue
                sequence += 1
                db.execute("DELETE FROM document_media WHERE document_id = ?", (id,))
                db.execute("DELETE FROM staged WHERE document_id = ?", (id,))
                db.execute("INSERT INTO tombstones (sequence, id) VALUES (?, ?)", (sequence, id))
                removed.append(Removed(sequence, id))
            rows.set_value(db, "sequence", sequence)
        return removed, unknown

    def forget_tombstones(self, up_to: int) -> None:
        """Drop deletions of sequence ≤ `up_to`; replay then works only from there on."""
        with self.transaction() as db:
            if up_to > rows.number(db, "horizon"):
                db.execute("DELETE FROM tombstones WHERE sequence <= ?", (up_to,))
                rows.set_value(db, "horizon", up_to)

    def record_snapshots(self, digests: Mapping[int, str]) -> None:
        """Keep the digest of each snapshot (by sequence); others are not to be trusted."""
        self.set_value(_SNAPSHOTS, json.dumps(dict(digests)))

    def snapshot_digests(self) -> dict[int, str]:
        """Sequence → digest of the snapshots that this corpus has written and kept."""
        return {int(k): str(v) for k, v in json.loads(self.value(_SNAPSHOTS) or "{}").items()}

    def set_value(self, key: str, value: str) -> None:
        """Keep a small setting of the corpus (such as where its media are)."""
        with self.transaction() as db:
            rows.set_value(db, key, value)

    # Reading

    @property
    def corpus_id(self) -> str:
        """Random id given at creation; ties snapshots to their corpus."""
        return self.value("corpus_id")

    @property
    def sequence(self) -> int:
        """Sequence number of the last write, 0 for a new corpus."""
        return int(self.value("sequence"))

    @property
    def horizon(self) -> int:
        """Replay is complete only from this sequence on (older tombstones are dropped)."""
        return int(self.value("horizon"))

    @property
    def profile(self) -> CorpusProfile | None:
        """Dimension and embedder version of all vectors, `None` while the corpus is empty."""
        with self.reader() as db:
            return rows.profile(db)

    def profiles(self) -> dict[CorpusProfile, int]:
        """How many vectors there are of each profile; more than one is a defect."""
        counted = "SELECT dimension, embedder_version, count(*) FROM documents GROUP BY 1, 2"
        with self.reader() as db:
            return {CorpusProfile(row[0], row[1]): row[2] for row in db.execute(counted)}

    def ids(self) -> list[str]:
        """The ids of all documents, sorted."""
        with self.reader() as db:
            return [row[0] for row in db.execute("SELECT id FROM documents ORDER BY id")]

    def value(self, key: str) -> str:
        with self.reader() as db:
            row = db.execute("SELECT value FROM corpus WHERE key = ?", (key,)).fetchone()
        return "" if row is None else str(row[0])

    def count(self) -> int:
        with self.reader() as db:
            return int(db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def documents(self, ids: Sequence[str]) -> dict[str, StoredDocument]:
        """The rows of the ids that exist."""
        columns = (
            "id, sequence, content_hash, parts, metadata, ecr_text, ecr_think, ecr_answer, "
            "ecr_tokens, ecr_truncated, reasoner_version, embedder_version"
        )
        return {
            row[0]: StoredDocument(
                id=row[0],
                sequence=row[1],
                content_hash=row[2],
                parts=decode_parts(row[3]),
                metadata=decode_metadata(row[4]),
                reasoning=Reasoning(row[5], row[6], row[7], row[8], bool(row[9])),
                reasoner_version=row[10],
                embedder_version=row[11],
            )
            for row in self._by_id(columns, ids)
        }

    def reasonings(self, ids: Sequence[str]) -> dict[str, Reasoning]:
        columns = "id, ecr_text, ecr_think, ecr_answer, ecr_tokens, ecr_truncated"
        return {
            row[0]: Reasoning(row[1], row[2], row[3], row[4], bool(row[5]))
            for row in self._by_id(columns, ids)
        }

    def reasonings_of(self, content_hashes: Sequence[str]) -> dict[tuple[str, str], Reasoning]:
        """(content hash, reasoner version) → the ECR that documents of that content have."""
        found: dict[tuple[str, str], Reasoning] = {}
        with self.reader() as db:
            for marks, chunk in rows.in_chunks(content_hashes):
                query = (
                    "SELECT content_hash, reasoner_version, ecr_text, ecr_think, ecr_answer, "
                    f"ecr_tokens, ecr_truncated FROM documents WHERE content_hash IN ({marks}) "
                    "AND reasoner_version != '' GROUP BY 1, 2"
                )
                for row in db.execute(query, chunk):
                    found[row[0], row[1]] = Reasoning(row[2], row[3], row[4], row[5], bool(row[6]))
        return found

    def versions(self, ids: Sequence[str]) -> dict[str, StoredVersions]:
        columns = "id, content_hash, reasoner_version, embedder_version, metadata"
        return {
            row[0]: StoredVersions(row[1], row[2], row[3], decode_metadata(row[4]))
            for row in self._by_id(columns, ids)
        }

    def metadata(self) -> dict[str, tuple[int, Metadata]]:
        """(sequence, metadata) of every document."""
        found: dict[str, tuple[int, Metadata]] = {}
        with self.reader() as db:
            every = db.execute("SELECT id, sequence, metadata FROM documents")
            while page := every.fetchmany(_PAGE):
                ids, sequences, raw = zip(*page, strict=True)
                values = zip(sequences, decode_all_metadata(raw), strict=True)
                found.update(zip(ids, values, strict=True))
        return found

    def changes_since(self, sequence: int) -> Iterator[Change]:
        """Live documents written after `sequence` and deletions after it, in order."""
        with self.reader() as db:
            log = db.execute(
                "SELECT sequence, id, metadata, dimension, vector FROM documents "
                "WHERE sequence > :s UNION ALL "
                "SELECT sequence, id, NULL, 0, NULL FROM tombstones WHERE sequence > :s "
                "ORDER BY 1",
                {"s": sequence},
            )
            for number, id, metadata, dimension, vector in log:
                if vector is None:
                    yield Removed(number, id)
                else:
                    yield Stored(
                        number, id, decode_vector(vector, dimension, id), decode_metadata(metadata)
                    )

    def entries_of(self, ids: Sequence[str]) -> list[Stored]:
        """What the index needs of the documents that exist, in any order."""
        columns = "sequence, id, dimension, vector, metadata"
        return [_stored(row) for row in self._by_id(columns, ids)]

    def page(self, after: str, limit: int) -> list[Stored]:
        """At most `limit` documents of greater id than `after`, in order of id."""
        query = (
            "SELECT sequence, id, dimension, vector, metadata FROM documents WHERE id > ? "
            "ORDER BY id LIMIT ?"
        )
        with self.reader() as db:
            return [_stored(row) for row in db.execute(query, (after, limit))]

    def sample(self, count: int) -> list[Stored]:
        """At most `count` different documents, drawn by random sequence numbers."""
        query = (
            "SELECT sequence, id, dimension, vector, metadata FROM documents WHERE sequence >= ? "
            "ORDER BY sequence LIMIT 1"
        )
        found: dict[int, Stored] = {}
        with self.reader() as db:
            last = rows.number(db, "sequence")
            for start in random.sample(range(1, last + 1), min(count, last)):
                for row in db.execute(query, (start,)):
                    found[row[0]] = _stored(row)
        return list(found.values())

    def metadata_of(self, ids: Sequence[str]) -> dict[str, Metadata]:
        """The metadata of the ids that exist."""
        return {row[0]: decode_metadata(row[1]) for row in self._by_id("id, metadata", ids)}

    def media_of(self, ids: Sequence[str]) -> set[str]:
        """Hashes of the media that the given documents name."""
        found: set[str] = set()
        with self.reader() as db:
            for marks, chunk in rows.in_chunks(ids):
                query = f"SELECT sha256 FROM document_media WHERE document_id IN ({marks})"
                found.update(row[0] for row in db.execute(query, chunk))
        return found

    def media_by_document(self, ids: Sequence[str]) -> dict[str, set[str]]:
        """The hashes that `document_media` has for each id; ids without media are left out."""
        found: dict[str, set[str]] = {}
        with self.reader() as db:
            for marks, chunk in rows.in_chunks(ids):
                query = f"SELECT * FROM document_media WHERE document_id IN ({marks})"
                for id, sha256, _ in db.execute(query, chunk):
                    found.setdefault(id, set()).add(sha256)
        return found

    def unreferenced(self, hashes: Sequence[str]) -> set[str]:
        """Those of the given media hashes that no document names."""
        found: set[str] = set()
        with self.reader() as db:
            for marks, chunk in rows.in_chunks(hashes):
                query = f"SELECT sha256 FROM document_media WHERE sha256 IN ({marks})"
                found.update(row[0] for row in db.execute(query, chunk))
        return set(hashes) - found

    def all_media(self) -> set[str]:
        with self.reader() as db:
            return {r[0] for r in db.execute("SELECT DISTINCT sha256 FROM document_media")}

    def media_bytes(self) -> int:
        """Bytes of all media that documents name, each counted once."""
        with self.reader() as db:
            distinct = "SELECT DISTINCT sha256, bytes FROM document_media"
            row = db.execute(f"SELECT coalesce(sum(bytes), 0) FROM ({distinct})").fetchone()
        return int(row[0])

    def database_bytes(self) -> int:
        """Bytes of the database with its write-ahead log."""
        files = (self._file, self._file.with_name(f"{DATABASE}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def integrity(self) -> list[str]:
        """Problems that SQLite finds in its own file; empty = none."""
        with self.reader() as db:
            lines = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
        return [] if lines == ["ok"] else lines

    def copy_to(self, path: Path) -> None:
        """Copy the database, as it is at one moment, over the file `path`; writers go on."""
        with self.reader() as source, translated(path):
            target = sqlite3.connect(path)
            try:
                source.backup(target)
                # One file, which can be read on a read-only disk.
                target.execute("PRAGMA journal_mode = DELETE")
            finally:
                target.close()

    # For the other modules of this package

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, translated(self._file):
            if self.read_only:
                raise not_writable(f"{self._file} (opened read-only)")
            if self._writer is None:
                raise UnavailableError("the corpus is closed; the server is shutting down")
            db = self._writer
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        if self._closed:
            raise UnavailableError("the corpus is closed; the server is shutting down")
        with translated(self._file):
            try:
                db = self._readers.get_nowait()
            except queue.Empty:
                db = self._connect(f"file:{_quoted(self._file)}?mode=ro")
            try:
                yield db
            finally:
                if self._closed:
                    db.close()
                else:
                    self._readers.put(db)

    # Inside

    def _connect(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
        )

    def _by_id(self, columns: str, ids: Sequence[str]) -> list[tuple]:
        found: list[tuple] = []
        with self.reader() as db:
            for marks, chunk in rows.in_chunks(ids):
                query = f"SELECT {columns} FROM documents WHERE id IN ({marks})"
                found += db.execute(query, chunk).fetchall()
        return found


def _stored(row: tuple) -> Stored:
    sequence, id, dimension, vector, metadata = row
    return Stored(sequence, id, decode_vector(vector, dimension, id), decode_metadata(metadata))


def _quoted(path: Path) -> str:
    # The path becomes part of a URI.
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
