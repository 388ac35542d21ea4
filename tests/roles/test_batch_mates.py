"""What else is in a batch changes nothing: to the bit within one bucket, to 1e-5 across buckets.

Inputs of one `submit` are taken together, so an example is really the batch that it says.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.engine.served_model import open_model
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import EmbedItem, ReasonItem, Sampling

WAIT_S = 60.0
ACROSS = 1e-5
WORDS = "a smiling cat dog face dark red skin tone thing".split()
EXAMPLES = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

POOL = [
    EmbedItem(Content.of("a cat"), Side.QUERY),
    EmbedItem(Content.of("", tiny_models.png(1)), Side.QUERY),
    EmbedItem(Content.of("the smiling dog face"), Side.QUERY, "<think>dog</think>\nAnswer: dog"),
    EmbedItem(Content.of("red", tiny_models.png(2)), Side.QUERY),
    EmbedItem(Content.of("", tiny_models.png(3)), Side.QUERY, "<think>noise</think>\nAnswer: red"),
    EmbedItem(Content.of("a red thing with a dark skin tone and a face"), Side.QUERY),
    EmbedItem(Content.of("", tiny_models.png(4, 28, 56)), Side.QUERY),
    EmbedItem(Content.of("cat", tiny_models.png(5, 84, 28)), Side.QUERY),
]
batches = st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=9)


def embeddings(role: Embedder, items: list[EmbedItem]) -> np.ndarray:
    """Vectors of one request; vision features are computed with it, not found in the cache."""
    assert role.vision is not None
    role.vision.cache.clear()
    jobs = [role.prepare(item) for item in items]
    return np.stack([f.result(WAIT_S).vector for f in role.submit(jobs)])


@pytest.fixture(scope="module")
def one_bucket():
    """An embedder with a single shape for everything."""
    buckets = tiny_models.embedder().served.buckets
    served = open_model(
        tiny_models.vl_dir(), role="embedder", buckets=replace(buckets, embed=((4, 64),))
    )
    with Embedder(served) as role:
        role.warmup()
        yield role, [embeddings(role, [item])[0] for item in POOL]


@EXAMPLES
@given(batch=batches)
def test_embeddings_of_one_bucket_are_the_same_to_the_bit(one_bucket, batch):
    role, alone = one_bucket
    found = embeddings(role, [POOL[i] for i in batch])
    for row, which in enumerate(batch):
        np.testing.assert_array_equal(found[row], alone[which])


@EXAMPLES
@given(batch=batches)
def test_embeddings_of_any_bucket_are_the_same_to_1e_5(one_bucket, batch):
    _, alone = one_bucket
    found = embeddings(tiny_models.embedder(), [POOL[i] for i in batch])
    np.testing.assert_allclose(found, np.stack([alone[i] for i in batch]), atol=ACROSS, rtol=0)


texts = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def candidate(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))


def scores(role: Reranker, query: str, candidates: list[str]) -> np.ndarray:
    role.prefix_cache.clear()
    futures = role.submit(role.prepare(query, candidates))
    return np.array([f.result(WAIT_S).score for f in futures], np.float32)


@pytest.fixture(scope="module")
def one_score_bucket():
    buckets = tiny_models.reranker().served.buckets
    served = open_model(
        tiny_models.text_dir(), role="reranker", buckets=replace(buckets, score=((4, 64),))
    )
    with Reranker(served) as role:
        role.warmup()
        alone = {seed: scores(role, "a red cat", [candidate(seed)])[0] for seed in range(41)}
        yield role, alone


@EXAMPLES
@given(batch=texts)
def test_scores_of_one_bucket_are_the_same_to_the_bit(one_score_bucket, batch):
    role, alone = one_score_bucket
    found = scores(role, "a red cat", [candidate(seed) for seed in batch])
    np.testing.assert_array_equal(found, np.array([alone[seed] for seed in batch]))


@EXAMPLES
@given(batch=texts)
def test_scores_of_any_bucket_are_the_same_to_1e_5(one_score_bucket, batch):
    _, alone = one_score_bucket
    found = scores(tiny_models.reranker(), "a red cat", [candidate(seed) for seed in batch])
    expected = np.array([alone[seed] for seed in batch])
    np.testing.assert_allclose(found, expected, atol=ACROSS, rtol=0)


ASKED: list[dict[str, Any]] = [
    {"budget": budget, "sampling": sampling}
    for budget in (7, 24)
    for sampling in (Sampling(), Sampling(temperature=1.5, seed=3))
]
requests = st.lists(
    st.tuples(st.integers(0, len(POOL) - 1), st.integers(0, len(ASKED) - 1)),
    min_size=1,
    max_size=9,
)


def reasonings(role: Reasoner, asked: list[tuple[int, int]]) -> list[tuple[str, int]]:
    """Text and tokens of each request, all queued at once."""
    assert role.vision is not None
    role.vision.cache.clear()
    jobs = []
    for which, how in asked:
        item = ReasonItem(POOL[which].content, Side.QUERY)
        jobs.append(role.prepare(item, ASKED[how]["budget"], sampling=ASKED[how]["sampling"]))
    found = [f.result(WAIT_S).reasoning for f in role.submit(jobs)]
    return [(one.text, one.tokens) for one in found]


@pytest.fixture(scope="module")
def reasoned_alone():
    role = tiny_models.reasoner()
    every = [(which, how) for which in range(len(POOL)) for how in range(len(ASKED))]
    return role, {one: reasonings(role, [one])[0] for one in every}


@EXAMPLES
@given(asked=requests)
def test_reasonings_are_the_same_tokens(reasoned_alone, asked):
    role, alone = reasoned_alone
    assert len(set(alone.values())) > len(POOL)
    assert reasonings(role, asked) == [alone[one] for one in asked]
