"""What every `VectorIndex` does, whoever holds the vectors: ScaNN here, or Milvus (milvus-lite)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.index.documents import make_entry, random_units, unit
from tte_jax.corpus.staging import Staging
from tte_jax.errors import PreconditionError
from tte_jax.filters import AllOf, AnyOf, Equals, Not, OneOf, Prefix, Range
from tte_jax.stages import StagedVector

RNG = np.random.default_rng(3)
VECTORS = random_units(RNG, 60, 8)
METADATA = [
    {}
    if i % 7 == 0
    else {
        "n": i % 5,
        "x": i / 4 - 3,
        "name": f'näme {"ab"[i % 2]}%_"\\{i % 6}',
        "flag": i % 3 == 0,
        "mixed": (i, str(i), True)[i % 3],
        'key "quoted" ü': i,
    }
    for i in range(60)
]
FILTERS = [
    Equals("n", 1),
    Equals("n", 1.0),
    Equals("n", True),
    Equals("flag", True),
    Equals("flag", 1),
    Equals("mixed", 3),
    Equals("mixed", "4"),
    Equals("mixed", True),
    Equals('key "quoted" ü', 9),
    Equals("name", 'näme a%_"\\2'),
    Equals("nowhere", 1),
    Not(Equals("nowhere", 1)),
    Not(Equals("n", 1)),
    OneOf("n", (1, 3, "1")),
    OneOf("n", ()),
    Not(OneOf("n", (0, 1, 2))),
    OneOf("n", tuple(range(3, 1000))),
    Range("x", at_least=0.25),
    Range("x", below=0),
    Range("x", at_least=-1, below=1.5),
    Range("name", at_least=0),
    Not(Range("x", at_least=-1, below=1.5)),
    Range("n"),
    Not(Range("n")),
    Prefix("name", "näme a"),
    Prefix("name", 'näme a%_"'),
    Prefix("name", ""),
    Prefix("name", "n_"),
    Not(Prefix("name", "näme a")),
    AllOf(()),
    AnyOf(()),
    AllOf((Equals("n", 1), Not(Equals("flag", True)))),
    Not(AnyOf((Equals("n", 1), AllOf((Range("x", below=2), Not(Prefix("name", "näme b"))))))),
]


def fill(index, count=60):
    index.upsert([make_entry(f"d{i:02d}", VECTORS[i], metadata=METADATA[i]) for i in range(count)])


def test_writes_are_visible_to_the_next_search_and_survive_a_restart(open_index):
    index = open_index()
    assert index.search(VECTORS[0], 3) == []
    fill(index, 20)
    assert index.search(VECTORS[3], 1)[0].id == "d03"
    index.upsert([make_entry("d03", -VECTORS[3]), make_entry("new", VECTORS[3])])
    assert index.search(VECTORS[3], 1)[0].id == "new"
    assert index.delete(["d04", "nobody", "new"]) == (["d04", "new"], ["nobody"])
    before = index.search(VECTORS[3], 30)
    assert len(before) == 19 and not {"d04", "new"} & {hit.id for hit in before}
    assert before[0].cosine == pytest.approx(max(hit.cosine for hit in before))
    stats = index.stats()
    assert (stats.documents, stats.sequence, stats.dimension) == (19, 24, 8)
    assert index.verify() == []
    index = open_index()
    assert index.search(VECTORS[3], 30) == before
    assert index.verify() == []


def test_the_answer_is_that_of_a_sort_ties_by_id_at_any_k(open_index):
    index = open_index()
    vectors = VECTORS[np.arange(60) % 20]  # every vector three times
    index.upsert([make_entry(f"d{i:02d}", vectors[i]) for i in range(60)])
    queries = random_units(RNG, 6, 8)
    for k in (1, 7, 60, 1000):
        together = index.search_batch(queries, k)
        for query, hits in zip(queries, together, strict=True):
            scores = [(-float(np.float32((v * query.astype(np.float64)).sum()))) for v in vectors]
            truth = sorted(zip(scores, (f"d{i:02d}" for i in range(60)), strict=True))[:k]
            assert [hit.id for hit in hits] == [id for _, id in truth]
            np.testing.assert_allclose([h.cosine for h in hits], [-s for s, _ in truth], atol=1e-6)
            assert hits == index.search(query, k)


def test_filters_mean_the_same_everywhere(open_index):
    index = open_index()
    fill(index)
    for condition in FILTERS:
        expected = {f"d{i:02d}" for i in range(60) if condition.matches(METADATA[i])}
        hits = index.search(VECTORS[0], 100, condition)
        assert {hit.id for hit in hits} == expected, condition
        assert all(hit.metadata == METADATA[int(hit.id[1:])] for hit in hits)


def test_queries_of_another_dimension_or_embedder_are_refused(open_index):
    index = open_index()
    fill(index, 5)
    with pytest.raises(PreconditionError) as caught:
        index.search(unit(1, 0, 0), 1)
    assert caught.value.reason == "DIMENSION_MISMATCH"
    with pytest.raises(PreconditionError) as caught:
        index.search(VECTORS[0], 1, embedder_version="e2")
    assert caught.value.reason == "EMBEDDER_MISMATCH"
    assert len(index.search(VECTORS[0], 9, embedder_version="e1")) == 5


def test_an_emptied_corpus_may_change_its_dimension(open_index):
    index = open_index()
    fill(index, 5)
    index.delete([f"d{i:02d}" for i in range(5)])
    assert index.search(VECTORS[0], 9) == []
    index.upsert([make_entry("a", unit(1, 0, 0), embedder="e2")])
    assert [h.id for h in index.search(unit(1, 0, 0), 9, embedder_version="e2")] == ["a"]
    assert index.verify() == []
    index = open_index()
    assert [h.id for h in index.search(unit(1, 0, 0), 9)] == ["a"]


def test_an_emptied_corpus_answers_another_embedder_s_queries_with_nothing(open_index):
    index = open_index()
    fill(index, 5)
    index.delete([f"d{i:02d}" for i in range(4)])
    with pytest.raises(PreconditionError):
        index.search(unit(1, 0, 0), 9, embedder_version="e2")
    index.delete(["d04"])
    assert index.stats().embedder_version == ""
    assert index.search(VECTORS[0], 9, embedder_version="e2") == []
    assert index.search(unit(1, 0, 0), 9, embedder_version="e2") == []
    index.snapshot()
    fill(index, 5)
    with pytest.raises(PreconditionError):
        index.search(VECTORS[0], 9, embedder_version="e2")
    assert index.search(VECTORS[0], 1, embedder_version="e1")[0].id == "d00"
    assert index.verify() == []
    index = open_index()
    assert index.search(VECTORS[0], 1, embedder_version="e1")[0].id == "d00"


def test_a_rebuild_and_a_snapshot_change_no_answer(open_index):
    index = open_index()
    fill(index)
    index.delete(["d10"])
    before = index.search(VECTORS[10], 30, Equals("n", 1))
    first = index.stats().generation
    assert index.rebuild().rows == 59
    assert index.stats().generation == first + 1
    assert index.search(VECTORS[10], 30, Equals("n", 1)) == before
    assert index.snapshot().sequence == 61
    assert index.stats().snapshot_sequence == 61
    index.delete(["d11"])
    index = open_index()
    assert "d11" not in {hit.id for hit in index.search(VECTORS[10], 60)}
    assert index.verify() == []


def test_another_embedder_s_vectors_change_over_with_writes_in_between(open_index):
    index = open_index()
    fill(index, 12)
    after = random_units(RNG, 12, 5)
    documents, _ = index.pending("e2", limit=64)
    index.staging.put(
        "e2", [StagedVector(d.id, d.sequence, after[int(d.id[1:])]) for d in documents]
    )
    prepare = index.vectors.prepare

    def interrupted():
        prepared = prepare()
        # While the new index was made: one document is gone, one came back as another.
        index.delete(["d03"])
        index.upsert([make_entry("d04", VECTORS[20], metadata={"again": True})])
        (fresh,), _ = index.pending("e2", limit=64)
        index.staging.put("e2", [StagedVector("d04", fresh.sequence, after[3])])
        return prepared

    index.vectors.prepare = interrupted
    promoted = index.promote("e2")
    assert promoted.documents == 11
    hits = index.search(after[3], 20, embedder_version="e2")
    assert hits[0].id == "d04" and hits[0].metadata == {"again": True}
    assert len(hits) == 11
    assert index.verify() == []
    index = open_index()
    assert index.search(after[3], 20) == hits
    assert Staging(index.store).state().staged == 0


def test_a_write_that_forestalls_a_promotion_costs_no_second_index(open_index):
    index = open_index()
    fill(index, 12)
    after = random_units(RNG, 12, 5)
    prepare, prepares = index.vectors.prepare, []

    def stage(version: str, **options) -> None:
        documents, _ = index.pending(version, limit=64, **options)
        made = [StagedVector(d.id, d.sequence, after[int(d.id[1:])]) for d in documents]
        assert index.staging.put(version, made) == []

    def counted():
        prepared = prepare()
        prepares.append(prepared)
        index.upsert([make_entry("d04", VECTORS[20])])  # each time; only the first promotion asks
        return prepared

    def forestalled(version: str) -> None:
        with pytest.raises(PreconditionError) as caught:
            index.promote(version)
        assert caught.value.reason == "REEMBEDDING_INCOMPLETE"

    index.vectors.prepare = counted
    stage("e2")
    forestalled("e2")
    # Begun anew, for the same embedder: the first vectors must not come back.
    after[:] = after[::-1]
    stage("e2", restart=True)
    forestalled("e2")
    assert len(prepares) == 2
    index.delete(["d03"])
    index.rebuild()
    stage("e2")
    # Staged once more, by a second run: what was prepared stays right.
    rows = index.store.documents(["d05"])
    index.staging.put("e2", [StagedVector("d05", rows["d05"].sequence, after[0])])
    assert index.promote("e2").documents == 11
    assert not index.vectors.work_due  # nothing had to be made again
    assert len(prepares) == 2
    assert index.verify() == []
    for n in (4, 5, 7):
        assert index.search(after[n], 1, embedder_version="e2")[0].id == f"d{n:02d}"
    assert len(index.search(after[3], 20)) == 11
    # The next re-embedding has an index of its own.
    index.vectors.prepare = prepare
    stage("e3")
    index.promote("e3")
    assert index.verify() == []
    index = open_index()
    assert index.search(after[7], 1, embedder_version="e3")[0].id == "d07"


def test_the_index_of_a_corpus_with_documents_is_not_exchanged_by_a_flag(open_index, tmp_path):
    index = open_index()
    fill(index, 3)
    other = "scann" if index.stats().searcher.startswith("milvus") else "milvus:elsewhere.db"
    index.close()
    from tte_jax.index import CorpusIndex

    with pytest.raises(PreconditionError, match="tte corpus migrate --to") as caught:
        CorpusIndex.open(tmp_path / "corpus", index=other)
    assert caught.value.reason == "INDEX_ELSEWHERE"
