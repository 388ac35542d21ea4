from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.errors import InvalidInputError
from tte_jax.reranker import Reranker

CANDIDATES = ["a cat", "the smiling dog face with a dark skin tone", "dog", "", "a cat"]


LENGTH = 96


@pytest.fixture(scope="module")
def reranker():
    return tiny_models.reranker()


@jax.jit
def last_logits(model, ids, n):
    """Logits after n tokens of one right-padded sequence."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (1, 3, LENGTH))
    hidden, _ = model.forward(ids, valid=jnp.arange(LENGTH)[None] < n, positions=positions)
    return model.logits(hidden[0, n - 1])


def test_scores_equal_whole_unshared_sequences(reranker):
    """Through the queue, the buckets and the shared prefix, against one plain forward pass each."""
    scores = reranker.score("a red cat", CANDIDATES)
    prompts, model = reranker.served.prompts, reranker.served.model
    for score, candidate in zip(scores, CANDIDATES, strict=True):
        ids = np.concatenate(
            [prompts.rerank_prefix("a red cat").ids, prompts.rerank_suffix(candidate).ids]
        )
        logits = np.asarray(last_logits(model, np.pad(ids, (0, LENGTH - len(ids)))[None], len(ids)))
        expected = 1 / (1 + np.exp(logits[prompts.no_id] - logits[prompts.yes_id]))
        assert score == pytest.approx(expected, abs=1e-5)
    assert scores.dtype == np.float32
    assert scores[0] == scores[4] != scores[2]


def test_a_candidates_score_depends_on_no_other_candidate(reranker):
    together = reranker.score("a red cat", CANDIDATES * 20)
    assert together.shape == (100,)
    for row, candidate in enumerate(CANDIDATES):
        alone = reranker.score("a red cat", [candidate])[0]
        np.testing.assert_allclose(together[row::5], alone, atol=1e-6)


def test_queries_at_the_same_time_keep_their_own_prefixes(reranker):
    queries = ["a cat", "a dog", "the thing"]
    jobs = [reranker.prepare(q, CANDIDATES) for q in queries]
    futures = reranker.submit([job for group in zip(*jobs, strict=True) for job in group])
    scores = np.array([f.result(60).score for f in futures]).reshape(len(CANDIDATES), 3)
    for column, query in enumerate(queries):
        np.testing.assert_allclose(scores[:, column], reranker.score(query, CANDIDATES), atol=1e-6)


def test_the_querys_tokens_are_read_once(reranker):
    prompts = reranker.served.prompts
    prefix = len(prompts.rerank_prefix("never seen before").ids)
    suffixes = [len(prompts.rerank_suffix(c).ids) for c in CANDIDATES]
    _, first = reranker.run("never seen before", CANDIDATES)
    assert first.tokens_in == 5 * prefix + sum(suffixes)
    assert first.cached_tokens == 4 * prefix
    _, second = reranker.run("never seen before", CANDIDATES)
    assert second.cached_tokens == 5 * prefix
    assert (second.stage, second.model_version) == ("rerank", reranker.version)


def test_tags_of_reasonings_are_removed(reranker):
    tagged = reranker.score("<think>red</think>\nAnswer: cat", ["<think>x</think>\nAnswer: dog"])
    plain = reranker.score("red. Answer: cat", ["x. Answer: dog"])
    np.testing.assert_array_equal(tagged, plain)


def test_the_field_at_fault_is_named(reranker):
    with pytest.raises(InvalidInputError) as caught:
        reranker.score("  ", ["a"])
    assert caught.value.field == "query"
    with pytest.raises(InvalidInputError, match="at most 48") as caught:
        reranker.score("cat " * 60, ["a"])
    assert caught.value.field == "query"
    with pytest.raises(InvalidInputError, match="at most 64") as caught:
        reranker.score("a", ["b"] * 70 + ["cat " * 80])
    assert caught.value.field == "candidates[70]"


def test_no_candidates_are_no_scores(reranker):
    assert reranker.score("a", []).shape == (0,)


def test_a_prefix_larger_than_the_caches_bound_is_still_read_once():
    served = tiny_models.reranker().served
    with Reranker(served, prefix_cache_bytes=0) as role:
        role.warmup()
        run, names = role.table.run, []

        def watching(name, *arguments):
            names.append(name)
            return run(name, *arguments)

        role.table.run = watching
        scores = role.score("a red cat", CANDIDATES * 20)
        assert names.count("prefix") == 1 and names.count("score") > 1
        assert role.score("another query", ["a cat"]).shape == (1,)
        assert len(role.prefix_cache) == 1
    np.testing.assert_allclose(
        scores, tiny_models.reranker().score("a red cat", CANDIDATES * 20), atol=1e-6
    )
