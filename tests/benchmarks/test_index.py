from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import (
    contender_process,
    contenders,
    index,
    index_corpus,
    index_summary,
    index_thresholds,
    vectors,
)
from benchmarks.contender_process import ContenderProcess


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vectors.generate(tmp_path_factory.mktemp("data"), 3000, 50)


def test_generated_vectors_follow_from_the_seed_and_overlap(data, tmp_path):
    documents, queries = np.load(data.vectors), np.load(data.queries)
    assert documents.shape == (3000, vectors.DIMENSION)
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1.0, atol=1e-5)
    again = vectors.generate(tmp_path, 3000, 50)
    np.testing.assert_array_equal(np.load(again.vectors), documents)
    # Neighbours are near but not alone: the hundredth is not much farther than the first.
    scores = np.sort(queries @ documents.T, axis=1)[:, ::-1]
    assert (scores[:, 0] < 0.95).all()
    assert np.median(scores[:, 99] / scores[:, 0]) > 0.5


def test_the_truth_is_brute_force(data):
    documents, queries = np.load(data.vectors), np.load(data.queries)
    best = np.argsort(-(queries @ documents.T), axis=1)[:, :100]
    truth = np.load(data.truth)
    np.testing.assert_array_equal(truth[:, 0], best[:, 0])
    assert np.mean([len(set(a) & set(b)) for a, b in zip(truth, best, strict=True)]) > 99.9


def test_given_vectors_are_divided_into_documents_and_queries(tmp_path, data):
    every = np.load(data.vectors)
    own = vectors.from_vectors(tmp_path, every, 100)
    kept, asked = np.load(own.vectors), np.load(own.queries)
    assert (own.rows, len(kept), len(asked)) == (2900, 2900, 100)
    assert not {row.tobytes() for row in kept} & {row.tobytes() for row in asked}


def test_a_contender_answers_from_its_own_process(data, tmp_path):
    process = ContenderProcess("ours", data, tmp_path, 1)
    try:
        built = process.build()
        assert built["kind"] == "exact" and built["memory_mb"] > 2
        how = {"value": 1.0, "k": 10, "seconds": 0.01}
        assert process.measure(mode="batch", **how)["recall"] > 0.999
        single = process.measure(mode="single", **how)
        assert single["recall"] > 0.999 and 0 < single["p50_us"] <= single["p99_us"]
        with pytest.raises(RuntimeError, match="ours: (?s:.*)TypeError"):
            process.measure(mode="batch")
    finally:
        process.stop()
    with pytest.raises(RuntimeError, match="ours died"):
        process.build()


def test_the_crossover_lies_between_the_sizes_that_enclose_it():
    def at(slow, fast):
        return {"slow": {"single_us": slow}, "fast": {"single_us": fast}}

    sizes = [1000, 10_000, 100_000]
    figures = [at(1, 10), at(10, 10 * 10**0.5), at(100, 1)]
    # A loss of half a decade at 10,000, a gain of two at 100,000: a fifth of the way.
    found = index_thresholds.crossover(sizes, figures, "slow", "fast")
    assert found == pytest.approx(10_000 * 10**0.2, abs=100)
    assert index_thresholds.crossover(sizes, figures, "fast", "slow") is None
    assert index_thresholds.crossover(sizes, [at(100, 1)] * 3, "slow", "fast") == 1000


def test_the_table_compares_at_enough_recall():
    def point(contender, mode, qps, recall):
        return {"contender": contender, "mode": mode, "k": 10, "qps": qps, "recall": recall}

    points = [
        point("ours", "batch", 900.0, 0.94),
        point("ours", "batch", 500.0, 0.96),
        point("hnswlib", "batch", 200.0, 0.95),
        point("usearch", "batch", 400.0, 0.90),
        point("ours", "single", 90.0, 0.96),
        point("hnswlib", "single", 100.0, 0.96),
    ]
    named = {"rows": 1000, "build": {"build_s": 1.0, "memory_mb": 2.0}, "points": points}
    content = {
        "sets": {"1000": {"ours": named, "usearch": {"rows": 1000, "error": "no memory"}}},
        "upserts": {"per_second": 2500.0},
        "served": {"start": {"documents": 1000, "seconds": [3.0, 21.0]}},
    }
    rows = {what: (figure, verdict) for what, figure, _, verdict in index_summary.goals(content)}
    assert rows["1,000 vectors, batch: QPS against the best graph index"] == ("3.354 x", "ok")
    assert rows["1,000 vectors, single: QPS against the best graph index"] == ("0.9 x", "miss")
    assert rows["1,000 vectors, batch: QPS against FAISS IVF-PQ fast-scan"] == ("-", "miss")
    assert rows["durable upserts a second, batches of 100"] == ("2500", "ok")
    assert rows["start of the service with 1,000 documents"] == ("21 s", "miss")
    assert rows["through gRPC against in process, batches of 32"] == ("-", "miss")
    speeds = {row[1]: row for row in index_summary.speeds(content)}
    assert speeds["ours"] == ("1,000", "ours", "1.0", "2", "671", "90", "-", "-")
    assert speeds["usearch"][2:4] == ("failed", "-")
    for row in speeds.values():
        assert len(row) == len(index_summary.SPEEDS)


def test_a_curve_is_read_at_the_recall_between_its_points():
    at = index_summary.at_recall
    assert at([(0.94, 900.0), (0.96, 400.0)]) == pytest.approx(600.0)  # halfway, in logarithms
    assert at([(0.90, 2000.0), (0.94, 900.0), (0.96, 400.0), (0.99, 100.0)]) == pytest.approx(600)
    assert at([(0.94, 300.0), (0.96, 400.0)]) == 400.0  # less recall was not even faster
    assert at([(0.95, 400.0), (0.90, 900.0)]) == pytest.approx(400.0)
    assert at([(0.99, 400.0)]) == 400.0
    assert at([(0.90, 900.0)]) is None


def test_an_interrupted_run_goes_on_and_another_one_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "PACKAGES", ())
    monkeypatch.setattr(index.environment, "foreign_load", lambda seconds: 0.0)
    config = index.Config(out=tmp_path / "out.json")

    def interrupted():
        raise KeyboardInterrupt

    first = index.Results(config, {"sizes": [1]})
    assert first.step(["a", "b"], lambda: 1) == 1
    with pytest.raises(KeyboardInterrupt):
        first.step(["a", "c"], interrupted)
    again = index.Results(config, {"sizes": [1]})
    assert again.step(["a", "b"], lambda: 2) == 1
    assert again.step(["a", "c"], lambda: 3) == 3
    kept = json.loads(config.out.read_text())
    assert kept["a"] == {"b": 1, "c": 3}
    assert set(kept["pieces"]) == {"a / b", "a / c"}
    with pytest.raises(SystemExit, match="other settings"):
        index.Results(config, {"sizes": [2]})
    fresh = index.Config(out=config.out, fresh=True)
    assert "a" not in index.Results(fresh, {"sizes": [2]}).content


def test_an_interrupted_build_goes_on_where_it_was_saved(data, tmp_path, monkeypatch):
    pytest.importorskip("hnswlib")
    rows = np.load(data.vectors)
    monkeypatch.setattr(contenders, "_AT_ONCE", 1000)
    monkeypatch.setattr(contender_process, "_SAVE_EVERY_S", 0.0)

    class Interrupted(contenders.Hnswlib):
        def build(self, vectors, threads, done):
            if done == 2000:
                raise KeyboardInterrupt
            return super().build(vectors, threads, done)

    with pytest.raises(KeyboardInterrupt):
        contender_process._build(Interrupted(), "hnswlib", rows, tmp_path, 1)
    begun: list[int] = []

    class GoesOn(contenders.Hnswlib):
        def build(self, vectors, threads, done):
            begun.append(done)
            return super().build(vectors, threads, done)

    index = GoesOn()
    figures = contender_process._build(index, "hnswlib", rows, tmp_path, 1)
    assert (begun, figures["rows"]) == ([2000], 3000)
    index.set(200)
    index.threads(1)
    assert (index.search(rows[:3000:500], 1)[:, 0] == np.arange(0, 3000, 500)).all()
    begun.clear()
    assert contender_process._build(GoesOn(), "hnswlib", rows, tmp_path, 1) == figures
    assert begun == []


def test_the_served_corpus_is_searched_through_grpc_and_in_process(data, tmp_path):
    index_corpus.fill(tmp_path, np.load(data.vectors))
    found = index_corpus.searches(tmp_path, data, tmp_path / "log", seconds=0.01, rounds=1)
    assert found["searcher"] == "exact" and found["chosen"]["recall"] > 0.999
    for way in ("grpc", "in_process"):
        assert [(p["value"], p["k"]) for p in found[way]] == [(0, 10), (0, 100)]
        assert all(p["batch32_qps"] > 0 and p["single_qps"] > 0 for p in found[way])
