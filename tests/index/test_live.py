from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.index.documents import clustered_units, random_units, unit
from tte_jax.corpus.records import Removed, Stored
from tte_jax.errors import PreconditionError
from tte_jax.filters import Range
from tte_jax.index.generation import Rows
from tte_jax.index.live import IndexConfig, LiveIndex


def test_an_empty_index_finds_nothing():
    live = LiveIndex()
    assert live.search(unit(1, 0), 3) == []
    assert live.rebuild().rows == 0
    assert live.search(unit(1, 0), 3) == []


def test_writes_are_visible_to_the_next_search():
    live = LiveIndex()
    live.apply([Stored(1, "a", unit(1, 0), {"n": 1}), Stored(2, "b", unit(0, 1), {})])
    assert [f.id for f in live.search(unit(1, 0.1), 5)] == ["a", "b"]
    live.apply([Stored(3, "a", unit(-1, 0), {"n": 2})])
    found = live.search(unit(1, 0.1), 5)
    assert [f.id for f in found] == ["b", "a"]
    assert found[1].metadata == {"n": 2}
    live.apply([Removed(4, "b"), Removed(5, "never")])
    assert [f.id for f in live.search(unit(1, 0.1), 5)] == ["a"]
    assert live.view.sequence == 5


def test_a_view_taken_before_a_write_does_not_change():
    live = LiveIndex()
    live.apply([Stored(i, f"d{i}", unit(1, i), {}) for i in range(1, 40)])
    live.rebuild()
    live.apply([Stored(i, f"d{i}", unit(1, i), {}) for i in range(40, 80)])
    before = live.view
    names = set(before.gather().ids)
    live.apply([Stored(100 + i, f"d{i}", unit(-1, i), {}) for i in range(1, 200)])
    live.apply([Removed(400, "d1")])
    rows = before.gather()
    assert set(rows.ids) == names
    assert (rows.vectors[:, 0] > 0).all()


def test_another_dimension_is_refused_until_the_index_is_empty():
    live = LiveIndex()
    live.apply([Stored(1, "a", unit(1, 0), {})])
    with pytest.raises(PreconditionError, match="dimension 3.*dimension 2"):
        live.search(unit(1, 0, 0), 1)
    live.rebuild()
    live.apply([Removed(2, "a")])
    live.apply([Stored(3, "b", unit(1, 0, 0), {})])
    assert [f.id for f in live.search(unit(1, 0, 0), 1)] == ["b"]
    live.rebuild()
    assert [f.id for f in live.search(unit(1, 0, 0), 1)] == ["b"]


def test_writes_during_a_rebuild_are_carried_over(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = random_units(rng, 300, 8)
    rows = Rows([f"d{i:03d}" for i in range(300)], vectors, np.arange(1, 301), [{}] * 300)
    live = LiveIndex(rows, sequence=300, config=IndexConfig(exact_below=1))
    building, go_on = threading.Event(), threading.Event()
    build = live._build

    def paused(rows):
        building.set()
        assert go_on.wait(30)
        return build(rows)

    monkeypatch.setattr(live, "_build", paused)
    thread = threading.Thread(target=live.rebuild)
    thread.start()
    assert building.wait(30)
    assert live.rebuilding
    with pytest.raises(PreconditionError) as caught:
        live.rebuild()
    assert caught.value.reason == "REBUILD_RUNNING"
    live.apply([Removed(301, "d005"), Stored(302, "d006", -vectors[6], {"moved": True})])
    live.apply([Stored(303, "new", vectors[5], {})])
    assert live.search(vectors[5], 1)[0].id == "new"
    # What a search would find at the moment when the carried-over writes are being replayed.
    seen: list[str] = []
    after = live._after

    def watched(view, changes):
        seen.append(live.search(vectors[5], 1)[0].id)
        return after(view, changes)

    monkeypatch.setattr(live, "_after", watched)
    go_on.set()
    thread.join(30)
    assert seen == ["new"]
    assert not live.rebuilding
    assert live.view.generation.number == 2
    assert live.view.generation.searcher is not None
    assert live.search(vectors[5], 1)[0].id == "new"
    assert live.search(-vectors[6], 1)[0].metadata == {"moved": True}
    assert "d005" not in {f.id for f in live.search(vectors[5], 400)}
    assert live.view.sequence == 303
    assert live.view.live == 300


def test_a_failed_rebuild_leaves_the_old_generation_serving(monkeypatch):
    live = LiveIndex()
    live.apply([Stored(1, "a", unit(1, 0), {})])

    def fail(rows):
        raise MemoryError

    monkeypatch.setattr(live, "_build", fail)
    with pytest.raises(MemoryError):
        live.rebuild()
    monkeypatch.undo()
    assert not live.rebuilding
    assert live.search(unit(1, 0), 1)[0].id == "a"
    assert live.rebuild().generation == 2


def test_a_rebuild_is_due_when_the_delta_or_the_dead_outgrow_the_limit():
    config = IndexConfig(delta_rows=4, delta_share=0.5, exact_below=1000)
    live = LiveIndex(config=config)
    live.apply([Stored(i, f"d{i}", unit(1, i), {}) for i in range(1, 5)])
    assert not live.needs_rebuild()
    live.apply([Stored(9, "d9", unit(1, 9), {})])
    assert live.needs_rebuild()
    live.rebuild()
    assert not live.needs_rebuild()
    live.apply([Removed(10 + i, f"d{i}") for i in range(1, 5)])
    live.apply([Removed(20, "d9")])
    assert live.needs_rebuild()


def test_concurrent_searches_writes_and_rebuilds_never_show_a_deleted_document():
    rng = np.random.default_rng(2)
    dimension = 12
    base = random_units(rng, 600, dimension)
    fixed = Rows([f"fixed{i:03d}" for i in range(600)], base, np.arange(1, 601), [{}] * 600)
    live = LiveIndex(fixed, sequence=600, config=IndexConfig(exact_below=1, delta_rows=64))
    stop = threading.Event()
    problems: list[str] = []
    moving = random_units(rng, 50, dimension)
    # Per document: the last deletion that was acknowledged; no older version may be seen again.
    deleted_before = [0] * 50

    def write() -> None:
        own = np.random.default_rng(3)
        sequence = 600
        while not stop.is_set():
            i = int(own.integers(50))
            sequence += 1
            live.apply([Stored(sequence, f"moving{i}", moving[i], {"v": sequence})])
            if live.search(moving[i], 1)[0].id != f"moving{i}":
                problems.append(f"moving{i} invisible after its write")
            sequence += 1
            live.apply([Removed(sequence, f"moving{i}")])
            deleted_before[i] = sequence

    def read(seed: int) -> None:
        own = np.random.default_rng(seed)
        while not stop.is_set():
            i = int(own.integers(50))
            gone_since = deleted_before[i]
            found = live.search(moving[i], 5)
            if len(found) != 5 or len({f.id for f in found}) != 5:
                problems.append(f"{len(found)} results")
            for hit in found:
                if hit.id.startswith("fixed"):
                    row = int(hit.id[5:])
                    if abs(hit.cosine - float(base[row] @ moving[i])) > 1e-5:
                        problems.append(f"{hit.id} has the cosine of another row")
                elif hit.id == f"moving{i}" and hit.metadata["v"] < gone_since:
                    problems.append(f"{hit.id} came back from the dead")

    def rebuild() -> None:
        for _ in range(8):
            live.rebuild()
        stop.set()

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as exc:
            problems.append(repr(exc))
            stop.set()

    threads = [
        threading.Thread(target=guarded, args=(write,)),
        threading.Thread(target=guarded, args=(read, 1)),
        threading.Thread(target=guarded, args=(read, 2)),
        threading.Thread(target=guarded, args=(rebuild,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert live.view.generation.number == 9
    assert max(deleted_before) > 600


class Nearsighted:
    """Finds only the first half of the rows, until it is made to search harder."""

    kind = "nearsighted"

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.seen = len(vectors) // 2

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.vectors[: self.seen].T
        rows = np.argsort(-scores, axis=1)[:, :count]
        return rows, np.take_along_axis(scores, rows, axis=1)

    def search_harder(self) -> bool:
        before, self.seen = self.seen, len(self.vectors)
        return before < self.seen


def test_queries_that_a_searcher_answers_badly_make_it_drift_and_the_next_one_is_built_for_them(
    monkeypatch,
):
    rng = np.random.default_rng(5)
    # Queries point at the second half, canaries (drawn from `canary_rows`) at the first.
    near, far = random_units(rng, 300, 12), random_units(rng, 300, 12)
    near[:, 0], far[:, 0] = -2, 2
    vectors = np.concatenate([near, far])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = Rows([f"d{i:03d}" for i in range(600)], vectors, np.arange(1, 601), [{}] * 600)
    live = LiveIndex(rows, sequence=600, config=IndexConfig(exact_below=1, check_every=8))
    monkeypatch.setattr("tte_jax.index.scann_searcher.ScannSearcher", lambda v, **k: Nearsighted(v))
    monkeypatch.setattr("tte_jax.index.recall.canary_queries", lambda v, count: v[:16])
    assert live.rebuild().kind == "nearsighted"
    assert not live.needs_recall_check()
    for i in range(300, 310):
        live.search(vectors[i], 5)
    assert live.needs_recall_check()
    measured = live.measure_recall()
    assert (measured.recall, measured.queries) == (0.0, 10)
    assert live.query_recall == measured
    assert live.needs_rebuild()
    report = live.rebuild()
    assert (report.kind, report.recall) == ("nearsighted", 1.0)
    assert live.search(vectors[305], 1)[0].id == "d305"
    assert live.measure_recall().recall == 1.0
    assert not live.needs_rebuild()


def test_measuring_knows_filters_deletions_and_small_corpora():
    rng = np.random.default_rng(6)
    vectors = random_units(rng, 400, 8)
    rows = Rows(
        [f"d{i}" for i in range(400)], vectors, np.arange(1, 401), [{"n": i} for i in range(400)]
    )
    live = LiveIndex(rows, sequence=400, config=IndexConfig(exact_below=1))
    live.rebuild()
    live.search(vectors[0], 1000)
    live.search(vectors[1], 5, Range("n", below=3))
    live.search(vectors[2], 5, Range("n", at_least=1e6))
    live.apply([Removed(401, "d0"), Stored(402, "new", vectors[1], {"n": 1})])
    assert live.measure_recall() == (1.0, 3)


@pytest.mark.parametrize("kind", ["exact", "scann-ah", "scann-tree-ah"])
def test_threads_that_share_a_batch_change_nothing(kind):
    rng = np.random.default_rng(13)
    count = 1200
    points = clustered_units(rng, count + 300, 24)
    vectors, asked = points[:count], points[count:]
    vectors[900:] = vectors[:300]  # ties
    rows = Rows(
        [f"{i:05d}" for i in rng.permutation(count)],
        vectors,
        np.arange(1, count + 1),
        [{"n": i % 2} for i in range(count)],
    )
    config = IndexConfig(
        exact_below=count + 1 if kind == "exact" else 1,
        tree_from=1 if kind == "scann-tree-ah" else count + 1,
    )
    built = LiveIndex(rows, sequence=count, config=config)
    assert built.rebuild().kind == kind
    answers = []
    for threads in (1, 3):
        live = LiveIndex(
            sequence=count,
            config=replace(config, search_threads=threads),
            generation=built.view.generation,
        )
        answers.append([])
        for change in (None, Stored(count + 1, "new", asked[0], {"n": 0})):
            live.apply([change, Removed(count + 2, rows.ids[3])] if change else [])
            answers[-1] += [
                live.search_batch(asked[:queries], 7, condition)
                for queries in (3, 17, 32, 64, 300)
                for condition in (None, Range("n", below=1))
            ]
    assert answers[0] == answers[1]
    assert answers[0][-1][0][0].id == "new"
