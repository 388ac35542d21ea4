"""Rows for the reranker: every row has a right candidate, and texts as the cascade reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.training.drawings import emoji_data
from training.builtin.evaluate import Roles
from training.builtin.rerank_rows import Config, Questions, documents, drawings, names, ranked
from training.data.emoji import EmojiData
from tte_jax.builtin.models import EMBEDDER, REASONER, path_of
from tte_jax.embedder import Embedder
from tte_jax.reasoner import Reasoner

pytestmark = pytest.mark.training_runs

CONFIG = Config(documents=10, candidates=4, strangers=2, bare=0.5, budget=8)


@pytest.fixture(scope="module")
def data() -> EmojiData:
    return emoji_data()


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    with (
        Reasoner.from_pretrained(path_of(REASONER)) as reasoner,
        Embedder.from_pretrained(path_of(EMBEDDER)) as embedder,
    ):
        yield Roles(reasoner, embedder, None)


def test_rows_of_drawings(data: EmojiData, roles: Roles) -> None:
    rng = np.random.default_rng(0)
    chosen = documents(data, CONFIG.documents, rng)
    pool = drawings(roles, data, chosen, CONFIG, rng)
    assert pool.concepts.tolist() == data.concept_ids[chosen].tolist()
    questions = Questions(data, pool.concepts, CONFIG, rng)
    asked = questions.texts(12)
    rows = list(ranked(roles, asked, pool, CONFIG, rng))
    assert len(rows) == 12 and any(asked.bare) and not all(asked.bare)
    for row, content, bare in zip(rows, asked.contents, asked.bare, strict=True):
        assert len(row["candidates"]) == len(row["labels"])
        # A right one that was drawn as a stranger is left out.
        assert 4 <= len(row["candidates"]) <= 6 and not any(row["labels"][4:])
        assert 1 in row["labels"] and set(row["candidates"]) <= set(pool.read)
        # With the reasoning asked for, the reranker reads that, and else what was typed.
        assert (row["query"] == content.text) == bare
    for row in ranked(roles, questions.composed(6), pool, CONFIG, rng):
        assert 1 in row["labels"]


def test_drawings_look_for_names(data: EmojiData, roles: Roles) -> None:
    rng = np.random.default_rng(1)
    questions = Questions(data, np.arange(len(data.concepts)), CONFIG, rng)
    pool = names(roles, questions)
    assert sorted(pool.concepts) == list(range(len(data.concepts)))
    said = dict(zip(pool.read, pool.concepts.tolist(), strict=True))
    asked = questions.images(6)
    rows = list(ranked(roles, asked, pool, CONFIG, rng))
    assert len(rows) == 6
    for row, answer in zip(rows, asked.answers, strict=True):
        right = [c for c, label in zip(row["candidates"], row["labels"], strict=True) if label]
        assert [said[name] for name in right] == [answer]
