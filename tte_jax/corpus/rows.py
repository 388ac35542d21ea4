"""The SQL of single rows; every function runs inside its caller's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from tte_jax.corpus.records import (
    CorpusProfile,
    encode_metadata,
    encode_parts,
    encode_vector,
)
from tte_jax.errors import PreconditionError
from tte_jax.stages import IndexEntry

_IDS_PER_QUERY = 500


def put(db: sqlite3.Connection, entry: IndexEntry, sequence: int) -> None:
    document = entry.document
    reasoning = document.reasoning
    db.execute(
        "INSERT OR REPLACE INTO documents VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            document.id,
            sequence,
            document.content.content_hash,
            encode_metadata(document.metadata),
            encode_parts(entry),
            reasoning.text,
            reasoning.think,
            reasoning.answer,
            reasoning.tokens,
            int(reasoning.truncated),
            entry.reasoner_version,
            entry.embedder_version,
            len(entry.vector),
            encode_vector(entry.vector),
        ),
    )
    db.execute("DELETE FROM document_media WHERE document_id = ?", (document.id,))
    db.executemany(
        "INSERT OR IGNORE INTO document_media VALUES (?, ?, ?)",
        [(document.id, media.sha256, len(media.data)) for media in document.content.media],
    )


def admit(db: sqlite3.Connection, entries: Sequence[IndexEntry]) -> None:
    """Raise `PreconditionError` unless the vectors fit those the corpus holds."""
    expected = profile(db)
    for entry in entries:
        actual = CorpusProfile(len(entry.vector), entry.embedder_version)
        expected = expected or actual
        if actual.dimension != expected.dimension:
            raise PreconditionError(
                f"document {entry.document.id!r} has a vector of dimension "
                f"{actual.dimension}; this corpus holds dimension {expected.dimension}. "
                "Embed with the corpus's embedder, or ingest into an empty corpus.",
                reason="DIMENSION_MISMATCH",
                expected=expected.dimension,
                actual=actual.dimension,
            )
        if actual.embedder_version != expected.embedder_version:
            raise PreconditionError(
                f"document {entry.document.id!r} was embedded by "
                f"{actual.embedder_version!r}; this corpus holds vectors of "
                f"{expected.embedder_version!r}, and the two cannot be compared. Use the "
                "corpus's embedder, or ingest into an empty corpus.",
                reason="EMBEDDER_MISMATCH",
                expected=expected.embedder_version,
                actual=actual.embedder_version,
            )


def profile(db: sqlite3.Connection) -> CorpusProfile | None:
    row = db.execute("SELECT dimension, embedder_version FROM documents LIMIT 1").fetchone()
    return None if row is None else CorpusProfile(int(row[0]), str(row[1]))


def number(db: sqlite3.Connection, key: str) -> int:
    return int(db.execute("SELECT value FROM corpus WHERE key = ?", (key,)).fetchone()[0])


def text(db: sqlite3.Connection, key: str) -> str:
    """A setting of the corpus, "" when it is not set."""
    row = db.execute("SELECT value FROM corpus WHERE key = ?", (key,)).fetchone()
    return "" if row is None else str(row[0])


def set_value(db: sqlite3.Connection, key: str, value: object) -> None:
    db.execute("INSERT OR REPLACE INTO corpus (key, value) VALUES (?, ?)", (key, str(value)))


def in_chunks(ids: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    unique = list(dict.fromkeys(ids))
    for start in range(0, len(unique), _IDS_PER_QUERY):
        chunk = unique[start : start + _IDS_PER_QUERY]
        yield ",".join("?" * len(chunk)), chunk
