from __future__ import annotations

import numpy as np
import pytest

from tests.index.documents import random_units
from tte_jax.index import exact


def _search(vectors, query, k, ids, rows=None):
    of, rows = exact.propose(vectors, query[None], k, rows)
    scores = exact.score(vectors, query[None], of, rows)
    return [(id, score) for _, id, score in exact.rank(scores, lambda i: ids[rows[i]], k)]


def _oracle(vectors, query, k, ids, rows=None):
    rows = range(len(vectors)) if rows is None else rows
    wide = query.astype(np.float64)
    scored = [(-float(np.float32((vectors[r] * wide).sum())), ids[r]) for r in rows]
    return [(id, -negative) for negative, id in sorted(scored)[:k]]


@pytest.mark.parametrize("count", [1, 5, 400])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
def test_equals_a_sort_over_everything(count, share):
    rng = np.random.default_rng(count)
    vectors = random_units(rng, count, 24)
    ids = [f"d{i}" for i in rng.permutation(count)]
    rows = None if share == 1.0 else np.flatnonzero(rng.random(count) < share)
    for query in random_units(rng, 5, 24):
        for k in (1, 7, 1000):
            assert _search(vectors, query, k, ids, rows) == _oracle(vectors, query, k, ids, rows)


def test_equal_vectors_tie_exactly_wherever_they_stand_and_the_lowest_ids_win():
    rng = np.random.default_rng(0)
    # 37 columns and odd row counts: BLAS treats the last rows and columns differently.
    vectors = random_units(rng, 1003, 37)
    twins = rng.choice(1003, size=300, replace=False)
    vectors[twins] = vectors[twins[0]]
    ids = [f"{i:04d}" for i in rng.permutation(1003)]
    found = _search(vectors, vectors[twins[0]], 20, ids)
    assert [id for id, _ in found] == sorted(ids[i] for i in twins)[:20]
    assert len({score for _, score in found}) == 1


def test_scores_are_chunked_without_a_seam(monkeypatch):
    rng = np.random.default_rng(1)
    vectors = random_units(rng, 50, 8)
    queries = vectors[2:4]
    of, rows = np.repeat([0, 1], 25), np.arange(50)
    whole = exact.score(vectors, queries, of, rows)
    monkeypatch.setattr(exact, "_CHUNK_ROWS", 7)
    np.testing.assert_array_equal(exact.score(vectors, queries, of, rows), whole)
    np.testing.assert_allclose(whole, (vectors * queries[of]).sum(axis=1), atol=1e-6)


def test_scores_closer_than_float32_can_tell_are_decided_in_float64():
    rng = np.random.default_rng(2)
    base = random_units(rng, 1, 300)
    vectors = (base + 2e-7 * rng.standard_normal((500, 300))).astype(np.float32)
    ids = [f"{i:03d}" for i in range(500)]
    query = (base[0] + 0.02 * rng.standard_normal(300)).astype(np.float32)
    query /= np.linalg.norm(query)
    assert _search(vectors, query, 10, ids) == _oracle(vectors, query, 10, ids)


@pytest.mark.parametrize("rows", [None, "few", "many"])
def test_a_batch_proposes_for_each_query_what_it_proposes_alone(rows, monkeypatch):
    rng = np.random.default_rng(4)
    vectors, queries = random_units(rng, 300, 16), random_units(rng, 9, 16)
    chosen = {None: None, "few": np.arange(0, 300, 7), "many": np.arange(0, 300, 2)}[rows]
    # Two queries at a time, and gathered rows in several chunks.
    monkeypatch.setattr(exact, "_MOST_SCORES", 600)
    monkeypatch.setattr(exact, "_CHUNK_ROWS", 32)
    of, found = exact.propose(vectors, queries, 5, chosen)
    assert (np.diff(of) >= 0).all()
    for i, query in enumerate(queries):
        _, alone = exact.propose(vectors, query[None], 5, chosen)
        assert set(found[of == i]) == set(alone)
    of, found = exact.propose(vectors, queries, 400, chosen)
    assert len(found) == len(queries) * (300 if chosen is None else len(chosen))


@pytest.mark.parametrize(
    ("count", "k"), [(2, 1), (130, 1), (130, 120), (3163, 10), (3163, 120), (5000, 1), (5000, 500)]
)
def test_the_nearest_are_those_that_a_sort_finds_and_their_ties(count, k):
    rng = np.random.default_rng(count)
    scores = rng.standard_normal((7, count)).astype(np.float32)
    scores[1] = np.sort(scores[1])  # all of the best in a few groups
    scores[2] = 0.5
    scores[3, -3:] = 9.0
    scores[4] = np.round(scores[4])
    of, positions = exact.nearest(scores, k)
    assert (np.diff(of) >= 0).all()
    for row, mine in enumerate(scores):
        least = np.sort(mine)[-k] - exact.SLACK
        assert sorted(positions[of == row]) == np.flatnonzero(mine >= least).tolist()


@pytest.mark.parametrize("counts", [[5, 5, 5], [5, 6, 5, 0, 5], [700], [700, 700], [0, 0, 3], [0]])
def test_scores_do_not_depend_on_what_else_is_scored(counts):
    rng = np.random.default_rng(5)
    vectors, queries = random_units(rng, 900, 33), random_units(rng, len(counts), 33)
    of = np.repeat(np.arange(len(counts)), counts)
    rows = rng.integers(0, 900, len(of))
    truth = (vectors[rows] * queries[of].astype(np.float64)).sum(axis=1)
    scores = exact.score(vectors, queries, of, rows)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, truth, atol=1e-7)
    alone = [
        exact.score(vectors, queries[q : q + 1], of[:1], rows[i : i + 1]) for i, q in enumerate(of)
    ]
    assert scores.tolist() == [float(one[0]) for one in alone]
