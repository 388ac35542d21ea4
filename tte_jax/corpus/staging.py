"""Vectors of the next embedder, beside those that serve, until all of them are there.

Every staged vector names the sequence number of the document that it was made from: when the
document changes, the vector is stale and the document is pending again. Staging survives crashes,
so re-embedding goes on where it stopped. `promote` exchanges all vectors in one transaction.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tte_jax.corpus import rows
from tte_jax.corpus.records import check_vector, decode_vector, encode_vector
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.stages import StagedVector

_VERSION, _DIMENSION, _RUN = "staged_embedder", "staged_dimension", "staged_run"
_VALID = (
    "FROM documents AS d {join} staged AS s ON s.document_id = d.id AND s.sequence = d.sequence "
)


@dataclass(frozen=True)
class StagingState:
    """How far a re-embedding is; "" and 0 when none has begun."""

    embedder_version: str
    dimension: int
    staged: int
    pending: int


class Staging:
    """The staged vectors of one corpus; at most one next embedder at a time."""

    def __init__(self, store: CorpusStore) -> None:
        self._store = store

    def begin(self, embedder_version: str, *, restart: bool = False) -> None:
        """Make `embedder_version` the next embedder, or go on with it.

        Args:
          restart: give up what was staged, of this or another embedder.

        Raises:
          InvalidInputError: no version.
          PreconditionError: vectors of another embedder are staged (`REEMBEDDING_OTHER`), or the
            corpus has this embedder already (`ALREADY_EMBEDDED`).
        """
        if not embedder_version:
            raise InvalidInputError(
                "embedder_version is empty: name the next embedder", field="embedder_version"
            )
        with self._store.transaction() as db:
            profile = rows.profile(db)
            if profile is not None and profile.embedder_version == embedder_version:
                raise PreconditionError(
                    f"the corpus holds vectors of {embedder_version!r} already",
                    reason="ALREADY_EMBEDDED",
                )
            current = rows.text(db, _VERSION)
            if restart or not current:
                _forget(db)
                rows.set_value(db, _VERSION, embedder_version)
                rows.set_value(db, _RUN, uuid.uuid4().hex)
            elif current != embedder_version:
                raise PreconditionError(
                    f"a re-embedding for {current!r} has begun; finish it, or restart with "
                    f"{embedder_version!r}",
                    reason="REEMBEDDING_OTHER",
                    expected=current,
                    actual=embedder_version,
                )

    def abandon(self) -> None:
        """Drop what is staged."""
        with self._store.transaction() as db:
            _forget(db)

    def state(self) -> StagingState:
        with self._store.reader() as db:
            version = rows.text(db, _VERSION)
            staged = db.execute(f"SELECT count(*) {_VALID.format(join='JOIN')}").fetchone()[0]
            live = db.execute("SELECT count(*) FROM documents").fetchone()[0]
            dimension = int(rows.text(db, _DIMENSION) or 0)
        return StagingState(version, dimension, staged, live - staged if version else 0)

    def pending(self, limit: int, after: str = "") -> list[str]:
        """At most `limit` ids above `after`, in order, that have no valid staged vector."""
        query = (
            f"SELECT d.id {_VALID.format(join='LEFT JOIN')} "
            "WHERE s.document_id IS NULL AND d.id > ? ORDER BY d.id LIMIT ?"
        )
        with self._store.reader() as db:
            return [row[0] for row in db.execute(query, (after, limit))]

    def put(self, embedder_version: str, vectors: Sequence[StagedVector]) -> list[str]:
        """Keep vectors durably; returns the ids whose document is another one now, or gone.

        The first vector of a document stays until the document changes, since an index of it may
        be prepared; `begin` with `restart` gives it up.

        Raises:
          InvalidInputError: a vector that is not finite and normalised.
          PreconditionError: they are of another embedder than `begin` said, or of another
            dimension than those before.
        """
        for i, one in enumerate(vectors):
            check_vector(one.vector, f"vectors[{i}].vector")
        stale: list[str] = []
        with self._store.transaction() as db:
            _expect(rows.text(db, _VERSION), embedder_version)
            dimension = int(rows.text(db, _DIMENSION) or 0)
            for one in vectors:
                dimension = dimension or len(one.vector)
                if len(one.vector) != dimension:
                    raise PreconditionError(
                        f"the vector of document {one.id!r} has dimension {len(one.vector)}; those "
                        f"staged before have {dimension}",
                        reason="DIMENSION_MISMATCH",
                        expected=dimension,
                        actual=len(one.vector),
                    )
                stored = db.execute(
                    "INSERT INTO staged SELECT id, sequence, ? FROM documents "
                    "WHERE id = ? AND sequence = ? ON CONFLICT (document_id) DO UPDATE SET "
                    "vector = iif(sequence = excluded.sequence, vector, excluded.vector), "
                    "sequence = excluded.sequence",
                    (encode_vector(one.vector), one.id, one.sequence),
                ).rowcount
                if not stored:
                    stale.append(one.id)
            if dimension:
                rows.set_value(db, _DIMENSION, dimension)
        return stale

    def vectors(self) -> Iterator[StagedVector]:
        """All valid staged vectors, by id."""
        with self._store.reader() as db:
            dimension = int(rows.text(db, _DIMENSION) or 0)
            query = f"SELECT d.id, d.sequence, s.vector {_VALID.format(join='JOIN')} ORDER BY d.id"
            for id, sequence, raw in db.execute(query):
                yield StagedVector(id, sequence, decode_vector(raw, dimension, id))

    def check_complete(self, embedder_version: str) -> str:
        """Raise as `promote` would; changes nothing. Returns what names this re-embedding: begun
        anew, it is another one."""
        with self._store.reader() as db:
            _check_complete(db, embedder_version)
            return rows.text(db, _RUN)

    def promote(self, embedder_version: str, run: str | None = None) -> dict[str, tuple[int, int]]:
        """Make the staged vectors the corpus's, all in one transaction.

        Every document gets a new sequence number, so that replay brings every index over.
        Returns id → (sequence before, sequence now).

        Args:
          run: what `check_complete` said before their index was made; None = any.

        Raises:
          PreconditionError: documents are pending or it was begun anew since `run`
            (`REEMBEDDING_INCOMPLETE`), or another embedder was begun, or none.
        """
        with self._store.transaction() as db:
            _check_complete(db, embedder_version)
            if run is not None and run != rows.text(db, _RUN):
                raise PreconditionError(
                    f"the re-embedding for {embedder_version!r} was begun anew while the index of "
                    "its first vectors was made; promote again",
                    reason="REEMBEDDING_INCOMPLETE",
                )
            first = rows.number(db, "sequence") + 1
            before = db.execute("SELECT id, sequence FROM documents ORDER BY id").fetchall()
            dimension = int(rows.text(db, _DIMENSION) or 0)
            db.executemany(
                "UPDATE documents SET sequence = ?, embedder_version = ?, dimension = ?, "
                "vector = (SELECT vector FROM staged WHERE document_id = id) WHERE id = ?",
                ((first + i, embedder_version, dimension, id) for i, (id, _) in enumerate(before)),
            )
            rows.set_value(db, "sequence", first - 1 + len(before))
            _forget(db)
        return {id: (old, first + i) for i, (id, old) in enumerate(before)}


def _check_complete(db: sqlite3.Connection, embedder_version: str) -> None:
    _expect(rows.text(db, _VERSION), embedder_version)
    query = f"SELECT count(*) {_VALID.format(join='LEFT JOIN')} WHERE s.document_id IS NULL"
    if pending := db.execute(query).fetchone()[0]:
        raise PreconditionError(
            f"{pending} documents have no vector of {embedder_version!r} yet; embed them, then "
            "promote",
            reason="REEMBEDDING_INCOMPLETE",
            pending=pending,
        )


def _expect(current: str, actual: str) -> None:
    if current != actual or not actual:
        raise PreconditionError(
            f"these vectors are of {actual!r}; "
            + (f"the re-embedding that has begun is for {current!r}" if current
               else "no re-embedding has begun"),
            reason="REEMBEDDING_OTHER" if current else "NO_REEMBEDDING",
            expected=current,
            actual=actual,
        )  # fmt: skip


def _forget(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM staged")
    db.execute("DELETE FROM corpus WHERE key IN (?, ?, ?)", (_VERSION, _DIMENSION, _RUN))
