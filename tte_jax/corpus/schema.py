"""The corpus database's tables, its version, and how older versions are brought up to date."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Mapping

from tte_jax.errors import DataLossError, PreconditionError

# "TTEC" as a big-endian integer: tells a corpus from any other SQLite file.
APPLICATION_ID = 0x54544543
VERSION = 3

# The vector stands last: SQLite reads a row from its beginning, and most reads do not want it.
_TABLES = """
CREATE TABLE corpus (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE documents (
  id               TEXT PRIMARY KEY,
  sequence         INTEGER NOT NULL UNIQUE,
  content_hash     TEXT NOT NULL,
  metadata         TEXT NOT NULL,
  parts            TEXT NOT NULL,
  ecr_text         TEXT NOT NULL,
  ecr_think        TEXT NOT NULL,
  ecr_answer       TEXT NOT NULL,
  ecr_tokens       INTEGER NOT NULL,
  ecr_truncated    INTEGER NOT NULL,
  reasoner_version TEXT NOT NULL,
  embedder_version TEXT NOT NULL,
  dimension        INTEGER NOT NULL,
  vector           BLOB NOT NULL
);

CREATE TABLE tombstones (
  sequence INTEGER PRIMARY KEY,
  id       TEXT NOT NULL
);

CREATE TABLE document_media (
  document_id TEXT NOT NULL,
  sha256      TEXT NOT NULL,
  bytes       INTEGER NOT NULL,
  PRIMARY KEY (document_id, sha256)
) WITHOUT ROWID;

CREATE INDEX document_media_by_hash ON document_media (sha256);
"""

# Version 2: the next embedder's vectors (`staging`). Made by the migration, so that a new corpus
# and a migrated one cannot differ.
_STAGED = """
CREATE TABLE staged (
  document_id TEXT PRIMARY KEY,
  sequence    INTEGER NOT NULL,
  vector      BLOB NOT NULL
)
"""

# Version 3: the ECRs of a content, whatever its document's id (`CorpusStore.reasonings_of`).
_BY_CONTENT = "CREATE INDEX documents_by_content ON documents (content_hash, reasoner_version)"

Migration = Callable[[sqlite3.Connection], object]

# MIGRATIONS[v] turns a corpus of version v into one of version v + 1.
MIGRATIONS: Mapping[int, Migration] = {
    1: lambda connection: connection.execute(_STAGED),
    2: lambda connection: connection.execute(_BY_CONTENT),
}


def prepare(
    connection: sqlite3.Connection,
    *,
    where: object,
    version: int = VERSION,
    migrations: Mapping[int, Migration] = MIGRATIONS,
) -> None:
    """Create the tables in an empty database, or migrate an older corpus, in one transaction.

    Args:
      connection: opened with `isolation_level=None`.
      where: the database's path, for messages.
      version: the version this program works with.
      migrations: steps from each older version.

    Raises:
      PreconditionError: the corpus was made by a newer program.
      DataLossError: the file is a SQLite database but not a corpus.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = check(connection, where=where, version=version)
        if found == 0:
            _create(connection)
            found = 1
        for step in range(found, version):
            migrations[step](connection)
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check(
    connection: sqlite3.Connection,
    *,
    where: object,
    version: int = VERSION,
    may_migrate: bool = True,
) -> int:
    """The version of the corpus, 0 for an empty database; raises as `prepare` does, and
    PreconditionError for an older version unless it `may_migrate`."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if tables and application != APPLICATION_ID:
        raise DataLossError(
            f"{where} is a SQLite database but not a corpus (application id {application:#x}, "
            f"expected {APPLICATION_ID:#x}). Choose another directory.",
            reason="NOT_A_CORPUS",
            path=where,
        )
    if found > version:
        raise PreconditionError(
            f"the corpus {where} has schema version {found}; this program knows versions up to "
            f"{version}. Upgrade tte-jax, or open a corpus made by this version.",
            reason="SCHEMA_TOO_NEW",
            found=found,
            supported=version,
        )
    if found < version and not may_migrate:
        raise PreconditionError(
            f"the corpus {where} has schema version {found}, this program reads version {version}. "
            "Serve it once with this version, which brings it up to date.",
            reason="SCHEMA_TOO_OLD",
            found=found,
            supported=version,
        )
    return found if tables else 0


def _create(connection: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.executemany(
        "INSERT INTO corpus (key, value) VALUES (?, ?)",
        [("corpus_id", uuid.uuid4().hex), ("sequence", "0"), ("horizon", "0")],
    )
