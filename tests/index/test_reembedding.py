"""Another embedder's vectors: staged beside serving, exchanged in one step, never mixed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.index.documents import make_entry, random_units, unit
from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.filters import Equals
from tte_jax.index import CorpusIndex, IndexConfig, reembedding
from tte_jax.stages import StagedVector

OLD = random_units(np.random.default_rng(0), 20, 6)
NEW = random_units(np.random.default_rng(1), 20, 9)


@pytest.fixture
def index(tmp_path):
    index = CorpusIndex.open(tmp_path)
    index.upsert([make_entry(f"d{i:02d}", OLD[i], metadata={"n": i}) for i in range(20)])
    yield index
    index.close()


def staged(index: CorpusIndex, ids) -> list[StagedVector]:
    rows = index.store.documents(ids)
    return [StagedVector(id, rows[id].sequence, NEW[int(id[1:])]) for id in ids]


def stage_all(index: CorpusIndex) -> None:
    while some := index.staging.pending(7):
        assert index.staging.put("e2", staged(index, some)) == []


def test_a_corpus_changes_over_as_a_whole_and_searches_never_mix(index, tmp_path):
    index.staging.begin("e2")
    index.staging.put("e2", staged(index, ["d00", "d01"]))
    stats = index.stats()
    assert (stats.staged_embedder_version, stats.staged_documents) == ("e2", 2)
    with pytest.raises(PreconditionError, match="18 documents") as caught:
        index.promote("e2")
    assert caught.value.reason == "REEMBEDDING_INCOMPLETE"
    assert index.search(OLD[3], 1, embedder_version="e1")[0].id == "d03"
    stage_all(index)
    report = index.promote("e2")
    assert (report.documents, report.sequence) == (20, 40)
    assert index.search(NEW[3], 1, Equals("n", 3), embedder_version="e2")[0].id == "d03"
    stats = index.stats()
    assert (stats.embedder_version, stats.dimension, stats.generation) == ("e2", 9, 2)
    assert (stats.staged_embedder_version, stats.staged_documents) == ("", 0)
    with pytest.raises(PreconditionError, match="'e1'.*'e2'") as caught:
        index.search(OLD[3], 1, embedder_version="e1")
    assert caught.value.reason == "EMBEDDER_MISMATCH"
    with pytest.raises(PreconditionError):
        index.upsert([make_entry("x", OLD[0])])
    assert index.verify() == []
    index.close()
    again = CorpusIndex.open(tmp_path)
    assert again.search(NEW[3], 1, embedder_version="e2")[0].id == "d03"
    assert again.verify() == []
    again.close()


def test_what_is_written_meanwhile_is_embedded_again_or_gone(index, monkeypatch):
    index.staging.begin("e2")
    stage_all(index)
    before = staged(index, ["d05"])
    index.upsert([make_entry("d05", OLD[6], metadata={"n": 55})])
    index.delete(["d06"])
    assert index.staging.pending(99) == ["d05"]
    assert index.staging.put("e2", before) == ["d05"]  # made from what is no longer there
    assert index.staging.put("e2", [StagedVector("d06", 7, NEW[6])]) == ["d06"]
    stage_all(index)
    built = reembedding.build

    def while_it_is_built(store, **kwargs):
        green = built(store, **kwargs)
        # Written after the new index was made, and staged in time.
        index.upsert([make_entry("d07", OLD[7], metadata={"n": 77})])
        index.upsert([make_entry("d19b", OLD[7], metadata={"n": 78})])
        index.delete(["d08"])
        rows = index.store.documents(["d07", "d19b"])
        index.staging.put(
            "e2", [StagedVector(id, row.sequence, NEW[0]) for id, row in rows.items()]
        )
        return green

    monkeypatch.setattr(reembedding, "build", while_it_is_built)
    assert index.promote("e2").documents == 19
    found = {hit.id: hit for hit in index.search(NEW[0], 30)}
    assert len(found) == 19 and "d06" not in found and "d08" not in found
    assert found["d05"].metadata == {"n": 55} and found["d07"].metadata == {"n": 77}
    assert found["d07"].cosine == pytest.approx(1.0) == found["d19b"].cosine
    assert index.verify() == []
    index.upsert([make_entry("d06", NEW[6], embedder="e2")])
    index.rebuild()
    assert index.search(NEW[6], 1)[0].id == "d06"
    assert index.verify() == []


def test_re_embedding_goes_on_after_a_restart_and_can_be_begun_anew(index, tmp_path):
    index.staging.begin("e2")
    index.staging.put("e2", staged(index, ["d00", "d01", "d02"]))
    index.close()
    again = CorpusIndex.open(tmp_path)
    again.staging.begin("e2")
    assert again.staging.pending(99)[0] == "d03"
    assert again.staging.pending(2, after="d10") == ["d11", "d12"]
    with pytest.raises(PreconditionError, match="'e2'.*'e3'") as caught:
        again.staging.begin("e3")
    assert caught.value.reason == "REEMBEDDING_OTHER"
    again.staging.begin("e3", restart=True)
    assert len(again.staging.pending(99)) == 20
    again.staging.abandon()
    assert again.stats().staged_embedder_version == ""
    again.close()


def test_vectors_that_cannot_be_staged(index):
    with pytest.raises(PreconditionError) as caught:
        index.staging.put("e2", staged(index, ["d00"]))
    assert caught.value.reason == "NO_REEMBEDDING"
    with pytest.raises(PreconditionError) as caught:
        index.promote("e2")
    assert caught.value.reason == "NO_REEMBEDDING"
    with pytest.raises(PreconditionError) as caught:
        index.staging.begin("e1")
    assert caught.value.reason == "ALREADY_EMBEDDED"
    with pytest.raises(InvalidInputError):
        index.staging.begin("")
    index.staging.begin("e2")
    with pytest.raises(PreconditionError) as caught:
        index.staging.put("e3", staged(index, ["d00"]))
    assert caught.value.reason == "REEMBEDDING_OTHER"
    with pytest.raises(InvalidInputError) as caught:
        index.staging.put("e2", [StagedVector("d00", 1, 2 * NEW[0])])
    assert caught.value.field == "vectors[0].vector"
    index.staging.put("e2", staged(index, ["d00"]))
    with pytest.raises(PreconditionError) as caught:
        index.staging.put("e2", [StagedVector("d01", 2, unit(1, 0))])
    assert caught.value.reason == "DIMENSION_MISMATCH"


def test_searches_go_on_through_the_change_and_see_one_embedder_or_the_other(index):
    index.staging.begin("e2")
    stage_all(index)
    stop, problems, seen = threading.Event(), [], set()

    def search() -> None:
        while not stop.is_set():
            for version, vectors in (("e1", OLD), ("e2", NEW)):
                try:
                    hits = index.search(vectors[4], 3, embedder_version=version)
                except PreconditionError as error:
                    if error.reason != "EMBEDDER_MISMATCH":
                        problems.append(error)
                    continue
                seen.add(version)
                if hits[0].id != "d04" or hits[0].cosine < 0.999:
                    problems.append(hits)

    thread = threading.Thread(target=search)
    thread.start()
    while "e1" not in seen and thread.is_alive():
        stop.wait(0.01)
    index.promote("e2")
    while "e2" not in seen and thread.is_alive():
        stop.wait(0.01)
    stop.set()
    thread.join(30)
    assert problems == [] and seen == {"e1", "e2"}


def test_an_emptied_corpus_may_change_its_embedder_at_once(index):
    index.delete([f"d{i:02d}" for i in range(20)])
    index.upsert([make_entry("a", NEW[0], embedder="e2")])
    assert index.search(NEW[0], 1, embedder_version="e2")[0].id == "a"
    with pytest.raises(PreconditionError):
        index.search(OLD[0], 1, embedder_version="e1")


def test_the_new_index_is_approximate_when_the_corpus_is_large(tmp_path):
    config = IndexConfig(exact_below=300)
    index = CorpusIndex.open(tmp_path, config=config)
    rng = np.random.default_rng(2)
    old, new = random_units(rng, 400, 8), random_units(rng, 400, 12)
    index.upsert([make_entry(f"d{i:03d}", old[i]) for i in range(400)])
    index.maintenance.join(60)
    index.staging.begin("e2")
    rows = index.store.documents([f"d{i:03d}" for i in range(400)])
    index.staging.put(
        "e2", [StagedVector(id, row.sequence, new[int(id[1:])]) for id, row in rows.items()]
    )
    index.promote("e2")
    assert index.stats().searcher == "scann-ah"
    assert index.search(new[9], 1, embedder_version="e2")[0].id == "d009"
    index.maintenance.join(60)
    assert index.verify() == []
    index.close()
