from __future__ import annotations

import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from tests.index.documents import make_entry, unit
from tte_jax.content import NO_REASONING, Content, Document, Media, MediaKind, Reasoning, Text
from tte_jax.corpus import schema
from tte_jax.corpus.records import CorpusProfile, MediaRef, Removed, Stored
from tte_jax.corpus.store import DATABASE, CorpusStore
from tte_jax.errors import (
    DataLossError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    StorageFullError,
    UnavailableError,
)
from tte_jax.stages import IndexEntry


def test_everything_stored_comes_back(tmp_path):
    content = Content(
        (Media(b"png"), Text("a cat"), Media(b"pdf", MediaKind.PAGE, 3), Text("sleeping"))
    )
    reasoning = Reasoning("<think>fur</think>\nAnswer: cat", "fur", "cat", 9, True)
    metadata = {"name": "Kätzchen", "n": 3, "x": 1.0, "flag": True}
    vector = unit(1, 2, 2)
    entry = IndexEntry(Document("c", content, metadata, reasoning), vector, "r-1", "e-1")
    with_store = CorpusStore.open(tmp_path)
    assert with_store.upsert([entry]) == [1]
    with_store.close()

    store = CorpusStore.open(tmp_path)
    row = store.documents(["c", "missing"])["c"]
    assert row.parts[0] == MediaRef(Media(b"png").sha256, 3, MediaKind.IMAGE, 0)
    assert row.parts[1] == Text("a cat")
    assert row.parts[2] == MediaRef(Media(b"pdf").sha256, 3, MediaKind.PAGE, 3)
    assert row.metadata == metadata
    assert [type(v) for v in row.metadata.values()] == [bool, int, str, float]  # sorted keys
    assert row.reasoning == reasoning
    assert store.reasonings(["c"]) == {"c": reasoning}
    versions = (content.content_hash, "r-1", "e-1", metadata)
    assert store.versions(["c", "missing"]) == {"c": versions}
    assert store.profile == CorpusProfile(3, "e-1")
    (change,) = store.changes_since(0)
    assert isinstance(change, Stored)
    np.testing.assert_array_equal(change.vector, vector)
    assert change.vector.dtype == np.float32
    store.close()


def test_sequence_grows_and_is_never_given_out_twice(tmp_path):
    store = CorpusStore.open(tmp_path)
    assert store.upsert([make_entry("a", unit(1, 0)), make_entry("b", unit(0, 1))]) == [1, 2]
    assert store.delete(["b", "nobody", "b"]) == ([Removed(3, "b")], ["nobody"])
    store.close()
    store = CorpusStore.open(tmp_path)
    assert store.sequence == 3
    assert store.upsert([make_entry("b", unit(1, 1))]) == [4]
    assert [(c.sequence, c.id) for c in store.changes_since(0)] == [(1, "a"), (3, "b"), (4, "b")]
    assert [c.sequence for c in store.changes_since(3)] == [4]
    store.close()


def test_a_batch_is_all_or_nothing(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    with pytest.raises(PreconditionError):
        store.upsert([make_entry("b", unit(1, 0)), make_entry("c", unit(1, 0, 0))])
    assert store.count() == 1
    assert store.sequence == 1
    store.close()


def test_vectors_of_another_dimension_or_embedder_are_refused_until_the_corpus_is_empty(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    with pytest.raises(PreconditionError, match="dimension 3.*dimension 2") as caught:
        store.upsert([make_entry("b", unit(1, 0, 0))])
    assert caught.value.reason == "DIMENSION_MISMATCH"
    with pytest.raises(PreconditionError, match="'e2'.*'e1'") as caught:
        store.upsert([make_entry("b", unit(1, 0), embedder="e2")])
    assert caught.value.reason == "EMBEDDER_MISMATCH"
    store.delete(["a"])
    store.upsert([make_entry("b", unit(1, 0, 0), embedder="e2")])
    assert store.profile == CorpusProfile(3, "e2")
    store.close()


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        (make_entry("", unit(1, 0)), "entries[0].document.id"),
        (make_entry("x" * 1025, unit(1, 0)), "entries[0].document.id"),
        (make_entry("a\0b", unit(1, 0)), "entries[0].document.id"),
        (make_entry("\ud800", unit(1, 0)), "entries[0].document.id"),
        (make_entry("a", np.array([2.0, 0.0], np.float32)), "entries[0].vector"),
        (make_entry("a", np.array([np.nan, 1.0], np.float32)), "entries[0].vector"),
        (make_entry("a", np.array([1, 0])), "entries[0].vector"),
        (make_entry("a", np.zeros((0,), np.float32)), "entries[0].vector"),
        (make_entry("a", unit(1, 0)[None]), "entries[0].vector"),
        (make_entry("a", unit(1, 0), text="\ud800"), "entries[0].document"),
        (
            make_entry("a", unit(1, 0), metadata={"n": float("nan")}),
            "entries[0].document.metadata[n]",
        ),
        (make_entry("a", unit(1, 0), metadata={"": 1}), "entries[0].document.metadata"),
        (
            make_entry("a", unit(1, 0), metadata={"l": [1]}),  # type: ignore[dict-item]
            "entries[0].document.metadata[l]",
        ),
    ],
)
def test_what_cannot_be_stored_faithfully_is_refused_by_field(tmp_path, entry, field):
    store = CorpusStore.open(tmp_path)
    with pytest.raises(InvalidInputError) as caught:
        store.upsert([entry])
    assert caught.value.field == field
    assert store.count() == 0
    store.close()


def test_media_references_follow_the_documents(tmp_path):
    store = CorpusStore.open(tmp_path)
    one, two = Media(b"one").sha256, Media(b"two").sha256
    store.upsert([make_entry("a", unit(1, 0), image=b"one")])
    store.upsert([make_entry("b", unit(1, 0), image=b"one")])
    assert store.media_of(["a", "b"]) == {one}
    assert store.media_bytes() == 3
    store.upsert([make_entry("a", unit(1, 0), image=b"two")])
    assert store.unreferenced([one, two, "f" * 64]) == {"f" * 64}
    store.delete(["b"])
    assert store.unreferenced([one, two]) == {one}
    assert store.all_media() == {two}
    store.close()


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    with pytest.raises(PreconditionError, match="already open for writing by process") as caught:
        CorpusStore.open(tmp_path)
    assert caught.value.reason == "CORPUS_IN_USE"
    program = (
        "import sys\n"
        "from tte_jax.corpus.store import CorpusStore\n"
        "from tte_jax.errors import PreconditionError\n"
        "print(CorpusStore.open(sys.argv[1], read_only=True).count())\n"
        "try:\n    CorpusStore.open(sys.argv[1])\n"
        "except PreconditionError as exc:\n    print(exc.reason, exc.metadata['holder'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[:2] == ["1", "CORPUS_IN_USE"]
    store.close()
    CorpusStore.open(tmp_path).close()


def test_a_read_only_store_refuses_writes(tmp_path):
    with pytest.raises(NotFoundError, match="no corpus"):
        CorpusStore.open(tmp_path, read_only=True)
    CorpusStore.open(tmp_path).close()
    store = CorpusStore.open(tmp_path, read_only=True)
    with pytest.raises(PreconditionError, match="read-only") as caught:
        store.upsert([make_entry("a", unit(1, 0))])
    assert caught.value.reason == "READ_ONLY"
    store.close()


def test_a_closed_store_says_so(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.close()
    store.close()
    with pytest.raises(UnavailableError, match="closed"):
        store.count()
    with pytest.raises(UnavailableError, match="closed"):
        store.delete(["a"])


def test_a_full_disk_stores_nothing_and_the_store_lives_on(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    # SQLite's own limit takes the same path as ENOSPC does.
    assert store._writer is not None
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    big = [make_entry(f"big{i}", unit(1, 0), text="x" * 4000) for i in range(20)]
    with pytest.raises(StorageFullError, match="no space left"):
        store.upsert(big)
    assert store.count() == 1
    assert store.sequence == 1
    store._writer.execute("PRAGMA max_page_count = 1000000")
    assert store.upsert(big)[-1] == 21
    store.close()


def test_a_newer_schema_is_refused(tmp_path):
    CorpusStore.open(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE) as db:
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    db.close()
    for read_only in (False, True):
        with pytest.raises(
            PreconditionError, match=f"schema version {schema.VERSION + 1}.*Upgrade"
        ) as caught:
            CorpusStore.open(tmp_path, read_only=read_only)
        assert caught.value.reason == "SCHEMA_TOO_NEW"


def _as_version_1(path) -> None:
    """A corpus as the first version of this program made it."""
    db = sqlite3.connect(path / DATABASE, isolation_level=None)
    db.execute("DROP TABLE staged")
    db.execute("DROP INDEX documents_by_content")
    db.execute("PRAGMA user_version = 1")
    db.close()


def test_a_corpus_of_the_first_version_is_brought_up_to_date(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    store.close()
    _as_version_1(tmp_path)
    with pytest.raises(PreconditionError, match=f"version 1.*version {schema.VERSION}") as caught:
        CorpusStore.open(tmp_path, read_only=True)
    assert caught.value.reason == "SCHEMA_TOO_OLD"
    store = CorpusStore.open(tmp_path)
    assert list(store.documents(["a"])) == ["a"]
    assert store.delete(["a"]) == ([Removed(2, "a")], [])  # uses the new table
    store.close()
    CorpusStore.open(tmp_path, read_only=True).close()


def test_an_older_schema_is_migrated_step_by_step_or_not_at_all(tmp_path):
    store = CorpusStore.open(tmp_path)
    store.upsert([make_entry("a", unit(1, 0))])
    store.close()
    db = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)

    def add_column(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE documents ADD COLUMN language TEXT NOT NULL DEFAULT ''")

    def fail(connection: sqlite3.Connection) -> None:
        raise ZeroDivisionError

    now = schema.VERSION
    with pytest.raises(ZeroDivisionError):
        steps = {now: add_column, now + 1: fail}
        schema.prepare(db, where="x", version=now + 2, migrations=steps)
    assert db.execute("PRAGMA user_version").fetchone()[0] == now
    schema.prepare(db, where="x", version=now + 1, migrations={now: add_column})
    assert db.execute("SELECT id, language FROM documents").fetchall() == [("a", "")]
    assert db.execute("PRAGMA user_version").fetchone()[0] == now + 1
    db.close()


def test_files_that_are_no_corpus_are_named_so(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / DATABASE).write_bytes(b"this is not a database, " * 100)
    with pytest.raises(DataLossError, match="damaged or is not a corpus"):
        CorpusStore.open(tmp_path / "text")
    (tmp_path / "other").mkdir()
    db = sqlite3.connect(tmp_path / "other" / DATABASE)
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.commit()
    db.close()
    with pytest.raises(DataLossError, match="not a corpus"):
        CorpusStore.open(tmp_path / "other")


def test_odd_characters_in_the_path(tmp_path):
    path = tmp_path / "100% of #1?"
    store = CorpusStore.open(path)
    store.upsert([make_entry("a", unit(1, 0))])
    assert store.reasonings(["a"])["a"] != NO_REASONING
    store.close()
    assert (path / DATABASE).is_file()
