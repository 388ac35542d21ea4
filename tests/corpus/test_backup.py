"""Backups: consistent beside writers, whole or not there, and nothing damaged comes back."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.index.documents import make_entry, random_units, unit
from tte_jax.content import Media
from tte_jax.corpus.backup import MANIFEST, backup, check_manifest, restore
from tte_jax.corpus.media import LocalMedia
from tte_jax.corpus.store import DATABASE
from tte_jax.errors import DataLossError, NotFoundError, PreconditionError, StorageFullError
from tte_jax.index import CorpusIndex
from tte_jax.index.consistency import problems_at_rest


def fill(index: CorpusIndex) -> None:
    index.upsert(
        [
            make_entry("a", unit(1, 0), image=b"one", metadata={"n": 1}),
            make_entry("b", unit(0, 1), image=b"one"),
            make_entry("c", unit(1, 1), image=b"two"),
        ]
    )
    index.delete(["c"])


def test_a_served_corpus_is_backed_up_and_comes_back_whole(tmp_path: Path) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    fill(index)
    index.snapshot()
    made = backup(tmp_path / "corpus", tmp_path / "backup")
    assert (made.documents, made.sequence, made.media_files, made.media_bytes) == (2, 4, 1, 3)
    index.upsert([make_entry("later", unit(1, 1))])
    expected = index.search(unit(1, 0), 1)
    index.close()

    assert check_manifest(tmp_path / "backup") == made
    assert problems_at_rest(tmp_path / "backup") == []
    assert restore(tmp_path / "backup", tmp_path / "again") == made
    assert problems_at_rest(tmp_path / "again") == []
    again = CorpusIndex.open(tmp_path / "again")
    assert again.search(unit(1, 0), 1) == expected
    assert again.get(["b"])[0].content.media[0].data == b"one"
    assert again.get(["c", "later"]) == [None, None]
    assert again.upsert([make_entry("d", unit(1, 0))]) == 5
    assert again.verify() == []
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "backup", "corpus"]


def test_a_backup_beside_writers_is_one_moment_of_the_corpus(tmp_path: Path) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    vectors = random_units(np.random.default_rng(0), 40, 4)
    fill_all = [make_entry(f"d{i}", vectors[i], image=b"%d" % i) for i in range(40)]
    index.upsert(fill_all)
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            some = [f"d{i}" for i in range(turn % 4, 40, 4)]
            index.delete(some)
            # In every state of the corpus all documents of one quarter have one image.
            index.upsert([make_entry(id, vectors[0], image=b"turn %d" % turn) for id in some])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = backup(tmp_path / "corpus", tmp_path / "backup")
    except PreconditionError as error:  # possible by design, on a slow disk
        assert error.reason == "CORPUS_TOO_BUSY"
        return
    finally:
        stop.set()
        writer.join(30)
        index.close()
    assert made.documents in (30, 40)
    assert problems_at_rest(tmp_path / "backup") == []


def test_media_elsewhere_on_disk_are_copied_and_those_of_an_object_store_are_named(tmp_path):
    for name, uri in (("local", str(tmp_path / "far")), ("object", f"memory://b-{tmp_path.name}")):
        index = CorpusIndex.open(tmp_path / name, media_uri=uri)
        fill(index)
        index.close()
        made = backup(tmp_path / name, tmp_path / f"{name}-backup")
        assert made.media_uri == ("" if name == "local" else uri)
        restore(tmp_path / f"{name}-backup", tmp_path / f"{name}-again")
        again = CorpusIndex.open(tmp_path / f"{name}-again")
        assert again.media.uri == (str(tmp_path / f"{name}-again" / "media") if name == "local"
                                   else uri)  # fmt: skip
        assert again.verify() == []
        again.close()


def test_a_restored_corpus_removes_no_media_of_the_first_one(tmp_path: Path) -> None:
    uri = f"memory://own-{tmp_path.name}"
    first = CorpusIndex.open(tmp_path / "corpus", media_uri=uri)
    fill(first)
    backup(tmp_path / "corpus", tmp_path / "backup")
    first.upsert([make_entry("later", unit(1, 0), image=b"later")])
    restore(tmp_path / "backup", tmp_path / "again")
    again = CorpusIndex.open(tmp_path / "again")
    again.delete(["a", "b"])
    assert again.collect_garbage() == 0
    assert [d.content.media[0].data for d in first.get(["b", "later"]) if d] == [b"one", b"later"]
    assert first.verify() == []
    again.close()
    # Nor when the same place is spelt otherwise; with media of its own it tidies up again.
    again = CorpusIndex.open(tmp_path / "again", media_uri=f"{uri}/")
    assert again.collect_garbage() == 0
    again.close()
    again = CorpusIndex.open(tmp_path / "again", media_uri=f"{uri}-copy")
    again.upsert([make_entry("own", unit(1, 0), image=b"own")])
    again.delete(["own"])
    assert list(again.media.keys()) == []
    again.close()
    first.close()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    fill(index)
    index.close()
    backup(tmp_path / "corpus", tmp_path / "backup")
    with pytest.raises(PreconditionError) as caught:
        backup(tmp_path / "corpus", tmp_path / "backup")
    assert caught.value.reason == "TARGET_EXISTS"
    with pytest.raises(PreconditionError, match="move it away") as caught:
        restore(tmp_path / "backup", tmp_path / "corpus")
    assert caught.value.reason == "CORPUS_EXISTS"


def test_what_is_no_corpus_and_what_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no corpus"):
        backup(tmp_path / "absent", tmp_path / "backup")
    with pytest.raises(NotFoundError, match="no backup"):
        restore(tmp_path, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / DATABASE).write_bytes((folder / DATABASE).read_bytes() + b"x"),
        lambda folder: (folder / DATABASE).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: next(folder.glob("media/*/*/*")).write_bytes(b"onE"),
        lambda folder: next(folder.glob("media/*/*/*")).unlink(),
    ],
)
def test_a_damaged_backup_is_refused_and_leaves_nothing(tmp_path: Path, harm) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    fill(index)
    index.close()
    backup(tmp_path / "corpus", tmp_path / "backup")
    harm(tmp_path / "backup")
    with pytest.raises(DataLossError):
        restore(tmp_path / "backup", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup", "corpus"]


def test_a_backup_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2, "new": True}))
    with pytest.raises(PreconditionError, match="format 2.*format 1"):
        restore(tmp_path, tmp_path / "corpus")


def test_a_corpus_with_lost_media_is_not_backed_up_silently(tmp_path: Path) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    fill(index)
    index.media.remove(Media(b"one").sha256)
    index.close()
    with pytest.raises(DataLossError, match=Media(b"one").sha256):
        backup(tmp_path / "corpus", tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_a_full_disk_leaves_no_half_backup(tmp_path: Path, monkeypatch) -> None:
    index = CorpusIndex.open(tmp_path / "corpus")
    fill(index)
    index.close()

    def full(self, data):
        raise StorageFullError("no space left")

    monkeypatch.setattr(LocalMedia, "put", full)
    with pytest.raises(StorageFullError):
        backup(tmp_path / "corpus", tmp_path / "backup")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE documents SET embedder_version = 'e2' WHERE id = 'a'", "stand side by side"),
        ("UPDATE documents SET vector = zeroblob(8) WHERE id = 'a'", "length 0"),
        ("UPDATE documents SET vector = zeroblob(7) WHERE id = 'a'", "7 bytes"),
        ("UPDATE documents SET content_hash = 'x' WHERE id = 'a'", "other content"),
        ("UPDATE documents SET sequence = 99 WHERE id = 'a'", "not its own"),
        ("DELETE FROM document_media WHERE document_id = 'a'", "not accounted for"),
    ],
)
def test_verify_finds_what_does_not_fit_together(tmp_path: Path, change: str, said: str) -> None:
    index = CorpusIndex.open(tmp_path)
    fill(index)
    index.close()
    assert problems_at_rest(tmp_path) == []
    db = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
    db.execute(change)
    db.close()
    assert any(said in problem for problem in problems_at_rest(tmp_path))
