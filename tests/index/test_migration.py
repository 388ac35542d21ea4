"""Moving an index to Milvus and back: complete, resumable, and never half."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.index.conftest import needs_milvus
from tests.index.documents import make_entry, random_units
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError, InvalidInputError, PreconditionError, UnavailableError
from tte_jax.index import CorpusIndex, location, milvus_collection, milvus_contents
from tte_jax.index.migration import migrate

ROOT = Path(__file__).parents[2]
VECTORS = random_units(np.random.default_rng(0), 90, 8)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus"
    with closing(CorpusIndex.open(path)) as index:
        index.upsert(
            [make_entry(f"d{i:02d}", VECTORS[i], metadata={"n": i % 3}) for i in range(80)]
        )
        index.delete(["d07"])
    return path


def ask(path):
    with closing(CorpusIndex.open(path)) as index:
        assert index.verify() == []
        hits = [(h.id, h.cosine) for h in index.search(VECTORS[3], 100)]
        return index.stats().searcher, hits


def move(path, to, **options):
    with closing(CorpusStore.open(path)) as store:
        return migrate(store, str(to), **options)


@needs_milvus
def test_there_and_back(corpus, tmp_path):
    to = f"milvus:{tmp_path / 'm.db'}"
    kind, before = ask(corpus)
    assert kind == "exact" and len(before) == 79
    told: list[tuple[int, int]] = []
    moved = move(corpus, to, batch=30, progress=lambda *n: told.append(n))
    assert (moved.documents, moved.loaded) == (79, 79)
    assert told == [(30, 79), (60, 79), (79, 79)]
    assert not (corpus / "snapshots").exists()
    assert ask(corpus) == ("milvus-flat", before)
    assert move(corpus, to).loaded == 0
    back = move(corpus, "scann")
    assert (back.source, back.target) == (to, "scann")
    assert ask(corpus) == ("exact", before)
    with closing(CorpusStore.open(corpus)) as store:
        milvus = milvus_collection.Milvus(location.parse(to))
        assert not milvus.has(milvus_contents.collection_name(store, 1))
        milvus.close()


@needs_milvus
def test_killed_in_between_it_goes_on_even_after_the_corpus_was_written(corpus, tmp_path):
    to = f"milvus:{tmp_path / 'm.db'}"
    command = [sys.executable, str(ROOT / "tests/index/migrating.py"), str(corpus), to, "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(2)] == ["20 79\n", "40 79\n"]
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    # The corpus has not changed over: it is served from where it was, and written.
    with closing(CorpusIndex.open(corpus)) as index:
        assert index.stats().searcher == "exact"
        index.upsert([make_entry("d03", VECTORS[85]), make_entry("d00new", VECTORS[86])])
        index.delete(["d10", "d70"])
        before = [(h.id, h.cosine) for h in index.search(VECTORS[3], 100)]
    moved = move(corpus, to, batch=20)
    assert moved.documents == 78
    assert moved.loaded == 38  # what lies behind the fortieth document
    assert ask(corpus) == ("milvus-flat", before)


@needs_milvus
def test_a_move_that_cannot_be_verified_changes_nothing_and_begins_anew(
    corpus, tmp_path, monkeypatch
):
    to = f"milvus:{tmp_path / 'm.db'}"
    put = milvus_collection.Collection.put

    def lossy(self, documents):
        put(self, [d for d in documents if d.id != "d50"])

    monkeypatch.setattr(milvus_collection.Collection, "put", lossy)
    with pytest.raises(DataLossError, match="'d50' is missing") as caught:
        move(corpus, to)
    assert caught.value.reason == "MIGRATION_NOT_VERIFIED"
    assert ask(corpus)[0] == "exact"
    monkeypatch.undo()
    assert move(corpus, to).loaded == 79
    assert ask(corpus)[0] == "milvus-flat"


@needs_milvus
def test_writes_that_milvus_did_not_take_are_durable_and_never_missed(tmp_path, monkeypatch):
    path, where = tmp_path / "corpus", f"milvus:{tmp_path / 'm.db'}"
    index = CorpusIndex.open(path, index=where)
    index.upsert([make_entry(f"d{i}", VECTORS[i]) for i in range(5)])

    def away(self, *_):
        raise UnavailableError("no answer")

    monkeypatch.setattr(milvus_collection.Collection, "put", away)
    with pytest.raises(UnavailableError, match="durable but cannot be searched yet"):
        index.upsert([make_entry("late", VECTORS[9])])
    with pytest.raises(UnavailableError):  # rather than an answer without it
        index.search(VECTORS[9], 1)
    assert index.get(["late"])[0] is not None
    monkeypatch.undo()
    assert index.search(VECTORS[9], 1)[0].id == "late"
    assert index.verify() == []
    index.close()


@needs_milvus
def test_a_collection_that_lost_documents_is_loaded_again(tmp_path, caplog):
    path, where = tmp_path / "corpus", f"milvus:{tmp_path / 'm.db'}"
    index = CorpusIndex.open(path, index=where)
    index.upsert([make_entry(f"d{i}", VECTORS[i]) for i in range(5)])
    index.vectors._collection.remove(["d2"])
    assert index.verify() == ["document 'd2' is missing from the index"]
    index.close()
    index = CorpusIndex.open(path)
    assert "loading all of them" in caplog.text
    assert index.search(VECTORS[2], 1)[0].id == "d2"
    assert index.verify() == []
    index.close()


@needs_milvus
def test_index_files_that_a_crash_left_half_written_are_made_anew(corpus, tmp_path, caplog):
    to = f"milvus:{tmp_path / 'm.db'}"
    _, before = ask(corpus)
    # By another process: in this one milvus-lite would not read its files again.
    command = [sys.executable, str(ROOT / "tests/index/migrating.py"), str(corpus), to, "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    files = list((tmp_path / "m.db").rglob("*.idx"))
    assert files
    for file in files:
        os.truncate(file, 128)  # no more than the header
    assert ask(corpus) == ("milvus-flat", before)
    assert "are made anew" in caplog.text
    assert move(corpus, to).loaded == 0
    # Killed after the old index was dropped, before the new one.
    with closing(CorpusStore.open(corpus)) as store:
        milvus = milvus_collection.Milvus(location.parse(to))
        name = milvus_contents.collection_name(store, 1)
        milvus.client.release_collection(name)
        milvus.client.drop_index(name, "vector")
        milvus.close()
    assert ask(corpus) == ("milvus-flat", before)
    milvus = milvus_collection.Milvus(location.parse(to))
    assert milvus.client.list_indexes(name)
    milvus.close()


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pymilvus" else find(name)
    )
    with pytest.raises(PreconditionError, match=r"pip install tte-jax\[milvus\]") as caught:
        CorpusIndex.open(tmp_path / "corpus", index="milvus://localhost:19530")
    assert caught.value.reason == "EXTRA_MISSING"


@pytest.mark.parametrize("text", ["faiss", "milvus:", "milvus://", "milvus://user:pw@host:1", ""])
def test_what_is_no_index_is_refused(text):
    with pytest.raises(InvalidInputError, match="expected scann, milvus://") as caught:
        location.parse(text)
    assert caught.value.field == "index"


def test_how_a_milvus_is_named():
    server = location.parse("milvus://milvus.example:19530/shop")
    assert (server.uri, server.database) == ("http://milvus.example:19530", "shop")
    assert location.parse("milvus+tls://m:443").uri == "https://m:443"
    file = location.parse("milvus:m.db")
    assert (file.uri, file.is_file) == (str(Path("m.db").absolute()), True)
