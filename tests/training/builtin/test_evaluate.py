"""What the built-in models are asked, and how the answers are counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.training.drawings import emoji_data
from training.builtin import SERVED_STYLE
from training.builtin.evaluate import (
    FOUR_STYLES,
    UNSEEN_STYLE,
    Config,
    Pictures,
    Query,
    figures,
    plain_keys,
    pool_keys,
    ranks,
    tasks_of,
)
from training.data.emoji import EmojiData
from tte_jax.content import Content
from tte_jax.errors import InvalidInputError

CONFIG = Config(composed=3)


@pytest.fixture(scope="module")
def data() -> EmojiData:
    """Every concept in the four styles that queries and pools are of."""
    data = emoji_data(side=8)
    once = data.style_ids == 0
    count, styles = int(once.sum()), list(FOUR_STYLES)

    def repeated(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[once]] * len(styles))

    return replace(
        data,
        images=repeated(data.images),
        styles=styles,
        style_ids=np.repeat(np.arange(len(styles), dtype=np.int32), count),
        concept_ids=repeated(data.concept_ids),
        variants=repeated(data.variants),
        masks={k: repeated(v) for k, v in data.masks.items()},
        heldout_concept=repeated(np.arange(len(once)) == 12),
        heldout_combination=repeated(np.arange(len(once)) < 2),
    )


@pytest.fixture(scope="module")
def pictures(data: EmojiData) -> Pictures:
    return Pictures(data)


def test_six_tasks_whose_answers_stand_in_their_pools(data: EmojiData, pictures: Pictures) -> None:
    tasks = tasks_of(data, pictures, CONFIG)
    assert [len(t.queries) for t in tasks] == [10, 10, 10, 3, 3, 3]
    for task in tasks:
        pool = pool_keys(data, pictures, tasks, task.style, CONFIG)
        assert {q.answer for q in task.queries} <= set(pool)
    # Plain concepts only, by themselves or by what they are called.
    assert [q.answer for q in tasks[0].queries] == plain_keys(data, pictures)
    assert {q.marks for q in tasks[0].queries} == {("seen concept",), ("unseen concept",)}
    held_out = {data.concepts[i].key for i in (0, 1)}
    assert {q.answer for q in tasks[3].queries} <= held_out
    assert not {q.answer for q in tasks[5].queries} & held_out
    assert all(q.content.media and q.content.text for q in tasks[4].queries)


def test_skipped_queries_are_not_asked(data: EmojiData, pictures: Pictures) -> None:
    first = tasks_of(data, pictures, replace(CONFIG, limit=4))
    then = tasks_of(data, pictures, replace(CONFIG, limit=4, skip=4))
    keys = plain_keys(data, pictures)
    assert [q.answer for q in first[2].queries] == keys[:4]
    assert [q.answer for q in then[2].queries] == keys[4:8]
    with pytest.raises(InvalidInputError, match="skip 99 leaves no query of 10"):
        tasks_of(data, pictures, replace(CONFIG, skip=99))


def test_a_smaller_pool_holds_every_right_answer(data: EmojiData, pictures: Pictures) -> None:
    config = replace(CONFIG, limit=2, pool=6)
    tasks = tasks_of(data, pictures, config)
    for style in (UNSEEN_STYLE, SERVED_STYLE):
        right = {q.answer for t in tasks if t.style == style for q in t.queries}
        pool = pool_keys(data, pictures, tasks, style, config)
        assert right <= set(pool) and len(pool) == len(set(pool)) == max(6, len(right))
        assert pool == pool_keys(data, pictures, tasks, style, config)


def test_ranks_and_hits_by_hand() -> None:
    order = np.array([[4, 2, 7], [1, 2, 3], [5, 6, 0]])
    rank = ranks(order, np.array([2, 9, 5]))
    assert rank.tolist() == [1, 3, 0]
    queries = [Query(Content.of("x"), "k", (mark,)) for mark in ("a", "b", "a")]
    found = figures({"none": rank}, queries, 200, 0)
    assert found["chance"] == {"hit@1": 0.005, "hit@10": 0.05}
    assert found["none"]["hit@1"] == pytest.approx(1 / 3, abs=1e-4)
    by = found["none"]["by"]
    assert isinstance(by, dict)
    assert (by["a"]["hit@1"], by["a"]["queries"]) == (0.5, 2)
    assert (by["b"]["hit@1"], by["b"]["queries"]) == (0.0, 1)
