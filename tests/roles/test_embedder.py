from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder, truncate
from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.stages import EmbedItem

WAIT_S = 60.0


@pytest.fixture(scope="module")
def embedder():
    return tiny_models.embedder()


def item(text: str = "", image: int | None = None, reasoning: str = "") -> EmbedItem:
    images = () if image is None else (tiny_models.png(image),)
    side = Side.QUERY if text else Side.DOCUMENT
    return EmbedItem(Content.of(text, *images), side, reasoning)


ITEMS = [
    item("a cat"),
    item("", 1),
    item("the smiling dog face", None, "<think>dog</think>\nAnswer: dog"),
    item("red", 2),
    item("", 1, "<think>noise</think>\nAnswer: noise"),
    item("a dog"),
    item("", 3),
]


def test_vectors_are_unit_float32_in_the_order_of_the_items(embedder):
    vectors = embedder.embed(ITEMS)
    assert vectors.shape == (len(ITEMS), embedder.dimension) == (7, 64)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    for row, one in enumerate(ITEMS):
        np.testing.assert_allclose(embedder.embed([one])[0], vectors[row], atol=1e-5)
    assert (vectors @ vectors.T - np.eye(7)).max() < 0.9999  # no two alike


def test_more_items_than_any_bucket(embedder):
    many = [ITEMS[i % 7] for i in range(150)]
    vectors = embedder.embed(many)
    np.testing.assert_allclose(vectors, embedder.embed(ITEMS)[np.arange(150) % 7], atol=1e-5)


def test_a_shorter_dimension_is_cut_and_normalised_again(embedder):
    whole = embedder.embed(ITEMS[:2])
    cut = embedder.embed(ITEMS[:2], dimension=16)
    assert cut.shape == (2, 16)
    np.testing.assert_allclose(
        cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6
    )
    assert truncate(whole, 64) is whole
    for wrong in (-1, 65):
        with pytest.raises(InvalidInputError, match="outside 0 to 64") as caught:
            embedder.embed(ITEMS[:1], dimension=wrong)
        assert caught.value.field == "dimension"


def test_usage_counts_tokens_and_cached_vision_features(embedder):
    fresh = [item("", 50), item("", 51)]
    _, first = embedder.run(fresh)
    _, second = embedder.run(fresh)
    tokens = sum(len(embedder.served.prompts.embed(one).ids) for one in fresh)
    assert (first.stage, first.tokens_in, first.cached_tokens) == ("embed", tokens, 0)
    assert (second.tokens_in, second.cached_tokens) == (tokens, 8)
    assert first.model_version == embedder.version


def test_a_vector_that_is_not_finite_is_an_error_of_its_item_alone(embedder):
    good, bad = embedder.prepare(item("", 60)), embedder.prepare(item("", 61))
    (image,) = bad.input.images
    nan = replace(image, key="nan", patches=np.full_like(image.patches, np.nan))
    futures = embedder.submit([good, replace(bad, input=replace(bad.input, images=(nan,))), good])
    with pytest.raises(InternalError) as caught:
        futures[1].result(WAIT_S)
    assert caught.value.reason == "NAN"
    expected = embedder.embed([item("", 60)])[0]
    for index in (0, 2):
        np.testing.assert_allclose(futures[index].result(WAIT_S).vector, expected, atol=1e-5)


def test_a_sequence_too_long_names_its_field_and_the_limit(embedder):
    with pytest.raises(InvalidInputError, match="at most 64") as caught:
        embedder.embed([ITEMS[0], item("cat " * 80)])
    assert caught.value.field == "inputs[1].content"


def test_no_items_are_an_empty_matrix(embedder):
    assert embedder.embed([]).shape == (0, 64)


def test_bfloat16_is_near_float32(embedder):
    buckets = replace(embedder.served.buckets, embed=((4, 64),))
    with Embedder.from_pretrained(tiny_models.vl_dir(), dtype="bfloat16", buckets=buckets) as half:
        vectors = half.embed(ITEMS)
        assert vectors.dtype == np.float32
        cosines = (vectors * embedder.embed(ITEMS)).sum(axis=1)
        assert cosines.min() > 0.99
        assert half.version == embedder.version


def test_counters_tell_inputs_and_padding_apart(embedder):
    items = [EmbedItem(Content.of("cat"), Side.QUERY)] * 3
    tokens = len(embedder.served.prompts.embed(items[0]).ids)
    before = replace(embedder.queue.stats)
    embedder.embed(items)
    after = embedder.queue.stats
    assert after.tokens - before.tokens == 3 * tokens
    # Three short texts share two rows of a batch of 4 x 32; they may also have been taken apart.
    batches = after.batches - before.batches
    assert 1 <= batches <= 3
    assert batches <= after.rows - before.rows <= 3
    assert after.row_places - before.row_places == 4 * batches
    assert after.token_places - before.token_places == 128 * batches
    assert 0 < after.batch_fill <= 1 and 0 < after.pad_share < 1
    assert after.queue_s > before.queue_s
