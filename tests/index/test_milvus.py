"""What is said of a Milvus collection is measured and compared, not assumed (milvus-lite)."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from tests.index.conftest import needs_milvus
from tests.index.documents import make_entry, random_units
from tte_jax.corpus.backup import backup, restore
from tte_jax.errors import UnavailableError
from tte_jax.index import CorpusIndex, location, milvus_collection, milvus_contents
from tte_jax.index.consistency import problems_at_rest

pytestmark = needs_milvus

VECTORS = random_units(np.random.default_rng(1), 220, 8)


@pytest.fixture
def where(tmp_path) -> str:
    return f"milvus:{tmp_path / 'm.db'}"


def fill(index: CorpusIndex, start: int = 0, count: int = 200) -> None:
    index.upsert([make_entry(f"d{i:03d}", VECTORS[i]) for i in range(start, start + count)])


def test_the_recall_of_an_approximate_collection_is_measured_and_remembered(
    tmp_path, where, monkeypatch
):
    search = milvus_collection.Collection.search

    def nearsighted(self, queries, k, condition):
        found = search(self, queries, k, condition)
        return [(ids[k // 5 : k], vectors[k // 5 : k]) for ids, vectors in found]

    index = CorpusIndex.open(tmp_path / "corpus", index=where)
    fill(index)
    assert index.stats().canary_recall == index.stats().query_recall == 1.0  # FLAT is exact
    monkeypatch.setattr(milvus_collection.Milvus, "exact", False)
    stats = index.stats()
    assert (stats.canary_recall, stats.query_recall, stats.checked_queries) == (0.0, 0.0, 0)
    index.maintenance.poke()
    index.maintenance.join(30)
    assert index.stats().canary_recall == 1.0
    monkeypatch.setattr(milvus_collection.Collection, "search", nearsighted)
    report = index.rebuild()  # another collection: measured again
    assert report.recall == index.stats().canary_recall == 0.8
    index.close()
    monkeypatch.undo()
    monkeypatch.setattr(milvus_collection.Milvus, "exact", False)
    with closing(CorpusIndex.open(tmp_path / "corpus")) as index:
        assert index.maintenance.last_error == ""
        index.maintenance.join(30)
        assert index.stats().canary_recall == 0.8  # what was measured, not what would be now


def test_verify_at_rest_compares_the_collection(tmp_path, where, monkeypatch):
    corpus = tmp_path / "corpus"
    index = CorpusIndex.open(corpus, index=where)
    fill(index)
    collection = index.vectors._collection
    index.close()
    assert problems_at_rest(corpus) == []

    index = CorpusIndex.open(corpus)
    collection = index.vectors._collection
    (other,) = index.store.entries_of(["d004"])
    collection.put([other._replace(id="d003"), other._replace(id="ghost")])
    collection.remove(["d005"])
    # The last write is not in it, but the next start replays it: nothing is wrong with that.
    monkeypatch.setattr(milvus_collection.Collection, "put", _away)
    with pytest.raises(UnavailableError):
        fill(index, 200, 1)
    monkeypatch.undo()
    index.vectors._collection.flush()
    index.close()
    assert problems_at_rest(corpus) == [
        "document 'd003' has another vector in the index",
        "document 'd005' is missing from the index",
        "index: 'ghost' is not in the database",
    ]

    monkeypatch.setattr(milvus_contents.Milvus, "__init__", _away)
    (said,) = problems_at_rest(corpus)
    assert said == "the index was not compared: no answer"


def test_verify_at_rest_says_when_there_is_no_collection(tmp_path, where):
    corpus = tmp_path / "corpus"
    with closing(CorpusIndex.open(corpus, index=where)) as index:
        assert index.verify() == []
    assert problems_at_rest(corpus) == []  # an empty corpus needs none
    with closing(CorpusIndex.open(corpus)) as index:
        fill(index, 0, 3)
        name = index.vectors._collection.name
    milvus = milvus_collection.Milvus(location.parse(where))
    milvus.drop(name)
    milvus.close()
    (said,) = problems_at_rest(corpus)
    assert "has no collection" in said and "loads all 3 documents" in said


def test_a_restored_backup_is_a_corpus_of_its_own_beside_the_first(tmp_path, where):
    first, again = tmp_path / "corpus", tmp_path / "again"
    index = CorpusIndex.open(first, index=where)
    fill(index, 0, 5)
    backup(first, tmp_path / "backup")
    # The same number of documents as in the backup, but not the same ones.
    index.upsert([make_entry("d003", VECTORS[100])])
    index.delete(["d004"])
    fill(index, 5, 1)
    index.close()
    restore(tmp_path / "backup", again)
    with closing(CorpusIndex.open(again)) as index:
        assert index.stats().searcher == "milvus-flat"
        assert index.search(VECTORS[3], 1)[0].id == "d003"
        assert {hit.id for hit in index.search(VECTORS[0], 9)} == {f"d00{i}" for i in range(5)}
        assert index.verify() == []
        index.delete(["d000"])
    with closing(CorpusIndex.open(first)) as index:
        assert index.search(VECTORS[100], 1)[0].id == "d003"
        assert index.search(VECTORS[0], 1)[0].id == "d000"
        assert index.verify() == []


def _away(self, *_):
    raise UnavailableError("no answer")
