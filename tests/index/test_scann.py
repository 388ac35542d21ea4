from __future__ import annotations

import pickle
from contextlib import closing

import numpy as np
import pytest

from tests.index.documents import clustered_units, make_entry, random_units
from tte_jax.corpus.records import Removed, Stored
from tte_jax.filters import Equals
from tte_jax.index import CorpusIndex, exact
from tte_jax.index.generation import Rows
from tte_jax.index.live import IndexConfig, LiveIndex
from tte_jax.index.recall import check_recall
from tte_jax.index.scann_searcher import MINIMUM_ROWS, ScannSearcher


@pytest.mark.parametrize("tree", [False, True])
def test_recall_on_clustered_data(tree):
    rng = np.random.default_rng(3)
    points = clustered_units(rng, 3050, 32)
    vectors, queries = points[:3000], points[3000:]
    searcher = ScannSearcher(vectors, tree=tree)
    # A higher floor, reached on many canaries, leaves room for other queries.
    assert check_recall(searcher, vectors, canaries=512, floor=0.98) >= 0.98
    hits = 0
    for query in queries:
        truth = np.argsort(-(vectors @ query), kind="stable")[:10]
        found = searcher.propose(query[None], 70)[0][0]
        assert len(set(found.tolist())) == len(found)
        hits += len(set(truth.tolist()) & set(found.tolist()))
    assert hits / (10 * len(queries)) >= 0.95


@pytest.mark.parametrize("tree", [False, True])
def test_a_query_alone_gets_each_row_once_best_first_and_nothing_to_fill_up(tree):
    points = clustered_units(np.random.default_rng(5), 3020, 32)
    searcher = ScannSearcher(points[:3000], tree=tree)
    for effort in (searcher.efforts[0], searcher.efforts[len(searcher.efforts) // 2]):
        searcher.effort = effort
        for query in points[3000:]:
            rows, scores = searcher.propose(query[None], 60)
            assert (np.diff(scores[0]) <= 0).all()
            assert (rows[0] >= 0).all() and len(set(rows[0].tolist())) == rows.shape[1]


def test_searching_harder_ends_at_a_full_search():
    rng = np.random.default_rng(4)
    vectors = random_units(rng, 600, 16)  # no structure: a tree misses most
    searcher = ScannSearcher(vectors, tree=True)
    before = check_recall(searcher, vectors, canaries=40, floor=0.0)
    assert before < 0.95
    while searcher.search_harder():
        pass
    assert check_recall(searcher, vectors, canaries=40, floor=0.0) > 0.99
    assert len(searcher.propose(vectors[:1], 600)[0][0]) == 600


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match=str(MINIMUM_ROWS)):
        ScannSearcher(np.eye(4, dtype=np.float32), tree=False)


class Blind:
    """A searcher that misses everything and cannot do better."""

    kind = "blind"

    def propose(self, queries, count):
        return np.full((len(queries), 1), -1), np.full((len(queries), 1), -np.inf, np.float32)

    def search_harder(self):
        return False


def test_a_searcher_below_the_recall_floor_never_serves(monkeypatch):
    rng = np.random.default_rng(5)
    vectors = random_units(rng, 400, 8)
    rows = Rows([f"d{i}" for i in range(400)], vectors, np.arange(1, 401), [{}] * 400)
    live = LiveIndex(rows, sequence=400, config=IndexConfig(exact_below=1))
    monkeypatch.setattr("tte_jax.index.scann_searcher.ScannSearcher", lambda *a, **k: Blind())
    report = live.rebuild()
    assert report.kind == "exact"
    assert live.search(vectors[7], 1)[0].id == "d7"
    assert not live.needs_rebuild()


@pytest.mark.parametrize("tree_from", [10_000, 1])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_filters_equal_brute_force_through_scann(share, tree_from):
    rng = np.random.default_rng(6)
    count = 2000
    points = clustered_units(rng, count + 30, 24)
    vectors, queries = points[:count], points[count:]
    chosen = rng.random(count) < share
    metadata = [{"in": bool(c)} for c in chosen]
    rows = Rows([f"{i:05d}" for i in range(count)], vectors, np.arange(1, count + 1), metadata)
    live = LiveIndex(rows, sequence=count, config=IndexConfig(exact_below=1, tree_from=tree_from))
    assert live.rebuild().kind.startswith("scann")
    wanted = found = 0
    for query in queries:
        of, truth = exact.propose(vectors, query[None], 10, np.flatnonzero(chosen))
        best = np.sort(exact.score(vectors, query[None], of, truth))[::-1][:10].tolist()
        hits = live.search(query, 10, Equals("in", True))
        assert len(hits) == len(best)
        assert all(hit.metadata == {"in": True} for hit in hits)
        wanted += len(best)
        found += sum(hit.cosine >= best[-1] for hit in hits)
    # Below 15 % the survivors are searched exactly.
    assert found / wanted >= (1.0 if share < 0.15 else 0.95)


def test_a_filter_whose_survivors_lie_far_from_the_query_is_topped_up_exactly():
    rng = np.random.default_rng(8)
    vectors = random_units(rng, 1500, 16)
    query = vectors[0]
    far = vectors @ query < 0.0  # about half of all, and none of them near
    rows = Rows(
        [f"{i:05d}" for i in range(1500)],
        vectors,
        np.arange(1, 1501),
        [{"far": bool(f)} for f in far],
    )
    live = LiveIndex(rows, sequence=1500, config=IndexConfig(exact_below=1))
    assert live.rebuild().kind == "scann-ah"
    hits = live.search(query, 10, Equals("far", True))
    truth = np.sort((vectors @ query)[far])[::-1][:10]
    np.testing.assert_allclose([h.cosine for h in hits], truth, atol=1e-6)


def test_tombstones_and_the_delta_stand_in_front_of_scann():
    rng = np.random.default_rng(9)
    vectors = clustered_units(rng, 1000, 16)
    ids = [f"d{i:04d}" for i in range(1000)]
    rows = Rows(ids, vectors, np.arange(1, 1001), [{}] * 1000)
    live = LiveIndex(rows, sequence=1000, config=IndexConfig(exact_below=1))
    live.rebuild()
    query = vectors[10]
    top = [hit.id for hit in live.search(query, 5)]
    assert top[0] == "d0010"
    # Replace the best by something far away, delete the second, add a twin of the query.
    live.apply(
        [
            Stored(1001, top[0], -query, {}),
            Removed(1002, top[1]),
            Stored(1003, "twin", query, {"new": True}),
        ]
    )
    after = live.search(query, 4)
    assert [hit.id for hit in after] == ["twin", *top[2:5]]
    assert after[0].cosine == pytest.approx(1.0)
    # Delete nine tenths: what is left is found completely, in order.
    keep = set(ids[::10]) - {top[0], top[1]}
    gone = [id for id in ids if id not in keep and id != top[1]]
    live.apply([Removed(1004 + i, id) for i, id in enumerate(gone)])
    found = [hit.id for hit in live.search(query, 1000)]
    assert set(found) == keep | {"twin"}
    assert live.needs_rebuild() is False  # below the absolute limit of 2048 rows
    live.rebuild()
    assert [hit.id for hit in live.search(query, 1000)] == found


@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["exact", "scann-ah", "scann-tree-ah"])
def test_a_batch_answers_what_each_query_alone_is_answered(kind, share):
    rng = np.random.default_rng(11)
    count = 1500
    points = clustered_units(rng, count + 40, 24)
    vectors, queries = points[:count], points[count:]
    vectors[900:] = vectors[:600]  # ties
    chosen = rng.random(count) < (share or 1)
    rows = Rows(
        [f"{i:05d}" for i in rng.permutation(count)],
        vectors,
        np.arange(1, count + 1),
        [{"in": bool(c)} for c in chosen],
    )
    config = IndexConfig(
        exact_below=count + 1 if kind == "exact" else 1,
        tree_from=1 if kind == "scann-tree-ah" else count + 1,
        search_threads=2,
    )
    live = LiveIndex(rows, sequence=count, config=config)
    assert live.rebuild().kind == kind
    live.apply(
        [
            Removed(count + 1, rows.ids[3]),
            Stored(count + 2, "new", queries[0], {"in": True}),
            Stored(count + 3, rows.ids[4], queries[1], {"in": True}),
        ]
    )
    condition = None if share is None else Equals("in", True)
    for k in (1, 10, 700):
        together = live.search_batch(queries, k, condition)
        alone = [live.search(query, k, condition) for query in queries]
        for one, other in zip(together, alone, strict=True):
            assert [f.cosine for f in one] == sorted((f.cosine for f in one), reverse=True)
            assert len(one) == len(other) == len({f.id for f in one})
        if kind == "exact":
            assert together == alone
        else:
            # ScaNN's batches score in another order, so near the end they may find other rows.
            pairs = zip(together, alone, strict=True)
            same = sum(len({f.id for f in one} & {f.id for f in other}) for one, other in pairs)
            assert same >= 0.9 * sum(map(len, alone))
    assert together[0][0].id == "new"
    assert live.search_batch(queries[:0], 3) == []


def test_a_batch_finds_what_brute_force_finds():
    rng = np.random.default_rng(12)
    points = clustered_units(rng, 4064, 32)
    vectors, queries = points[:4000], points[4000:]
    rows = Rows([f"{i:05d}" for i in range(4000)], vectors, np.arange(1, 4001), [{}] * 4000)
    # The floor is reached on canaries; a higher one on many of them leaves room for other queries.
    config = IndexConfig(exact_below=1, tree_from=1, recall_floor=0.98, canaries=512)
    live = LiveIndex(rows, sequence=4000, config=config)
    live.rebuild()
    assert live.view.generation.searcher is not None  # not searched exactly
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = live.search_batch(queries, 10)
    right = sum(
        len({f.id for f in some} & {f"{i:05d}" for i in best})
        for some, best in zip(found, truth, strict=True)
    )
    assert right / truth.size >= 0.95
    wide = queries.astype(np.float64)
    for query, some in zip(wide, found, strict=True):
        for hit in some:
            assert hit.cosine == np.float32((vectors[int(hit.id)] * query).sum())


class Poison:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return (type(self.trace).touch, (self.trace,))


def test_nothing_of_scann_s_own_is_written_or_read(tmp_path):
    """Its loader unpickles `scann_docids.pkl`: whoever can put a file there runs code."""
    trace = tmp_path / "trace"
    corpus = tmp_path / "corpus"
    config = IndexConfig(exact_below=1)
    vectors = clustered_units(np.random.default_rng(10), 400, 16)
    with closing(CorpusIndex.open(corpus, config=config)) as index:
        index.upsert([make_entry(f"d{i:03d}", vectors[i]) for i in range(400)])
        assert index.rebuild().kind == "scann-ah"
        index.snapshot()
    written = {path.suffix for path in corpus.rglob("*") if path.is_file()}
    assert written <= {".sqlite3", ".npy", ".json", ".lock", ".sqlite3-wal", ".sqlite3-shm"}
    for folder in (corpus, corpus / "snapshots", *(corpus / "snapshots").iterdir()):
        for name in ("scann_docids.pkl", "scann_config.pb", "scann_assets.pbtxt"):
            (folder / name).write_bytes(pickle.dumps(Poison(trace)))
    with closing(CorpusIndex.open(corpus, config=config)) as index:
        index.maintenance.join(60)
        assert index.stats().searcher == "scann-ah"
        assert index.search(vectors[7], 1)[0].id == "d007"
        assert index.verify() == []
    assert not trace.exists()
    pickle.loads(pickle.dumps(Poison(trace)))
    assert trace.exists(), "the poison works"


def test_a_delete_with_an_unknown_id_shifts_no_ids(tmp_path):
    """ScaNN's own `delete` raises after it has changed its id map: ids are wrong for ever."""
    vectors = clustered_units(np.random.default_rng(11), 400, 16)
    with closing(CorpusIndex.open(tmp_path, config=IndexConfig(exact_below=1))) as index:
        index.upsert([make_entry(f"d{i:03d}", vectors[i]) for i in range(400)])
        assert index.rebuild().kind == "scann-ah"
        deleted, unknown = index.delete(["d100", "nobody", "d200", "d100"])
        assert (deleted, unknown) == (["d100", "d200"], ["nobody"])
        index.upsert([make_entry("d100", vectors[200])])
        for rebuilt in (False, True):
            assert index.stats().documents == 399
            for i in range(0, 400, 3):
                if i not in (100, 200):
                    assert index.search(vectors[i], 1)[0].id == f"d{i:03d}"
            assert index.search(vectors[200], 1)[0].id == "d100"
            assert index.verify() == []
            if not rebuilt:
                index.rebuild()


def test_a_leaf_with_too_few_rows_is_not_filled_up_with_row_0():
    """ScaNN fills up what it does not find with row 0, at a distance of NaN."""
    vectors = clustered_units(np.random.default_rng(12), 600, 16)
    searcher = ScannSearcher(vectors, tree=True)
    assert searcher.effort.leaves == 1
    rows, scores = searcher.propose(vectors[300:340], 500)
    missing = rows < 0
    assert missing.any()
    assert (scores[missing] == -np.inf).all() and np.isfinite(scores[~missing]).all()
    for some in rows:
        found = some[some >= 0]
        assert len(set(found.tolist())) == len(found) < 500
