"""One model that reasons and embeds: the reasoner's embeddings are the embedder's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side, Task
from tte_jax.errors import UnsupportedError
from tte_jax.local import LocalReasoner
from tte_jax.reasoner import Reasoner
from tte_jax.stages import GREEDY, EmbeddingReasonerStage, EmbedItem, ReasonItem, Sampling

WAIT_S = 60.0
png = tiny_models.png
CONTENTS = [
    Content.of("a cat"),
    Content.of("", png(1)),
    Content.of("red", png(2)),
    Content.of("the smiling dog face"),
    Content.of("", png(3, 56, 28), png(4)),
]
ITEMS = [ReasonItem(content, side) for content in CONTENTS for side in Side]


@pytest.fixture(scope="module")
def reasoner():
    return tiny_models.reasoner()


def expected(items, reasonings):
    """What the embedder makes of the items with these ECRs."""
    return tiny_models.embedder().embed(
        [
            EmbedItem(item.content, item.side, reasoning.text)
            for item, reasoning in zip(items, reasonings, strict=True)
        ]
    )


def assert_same(embeddings, vectors):
    for embedding, vector in zip(embeddings, vectors, strict=True):
        assert embedding is not None
        np.testing.assert_allclose(embedding.vector, vector, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("budget", "sampling"),
    [
        (6, GREEDY),
        (13, GREEDY),
        (13, Sampling(temperature=1.0, top_p=0.9, seed=1)),
        (12, Sampling(temperature=1.5, seed=5)),
        (13, Sampling(stop=("Answer",))),
    ],
)
def test_queries_and_documents_texts_images_and_both(reasoner, budget, sampling):
    """Random models write noise that the tokenizer spells otherwise: these are the hard cases."""
    reasonings, embeddings, usage = reasoner.reason_and_embed(ITEMS, budget, sampling=sampling)
    assert reasonings == reasoner.reason(ITEMS, budget, sampling=sampling)
    assert_same(embeddings, expected(ITEMS, reasonings))
    assert len({r.text for r in reasonings}) > 1
    for item, reasoning, embedding in zip(ITEMS, reasonings, embeddings, strict=True):
        asked = EmbedItem(item.content, item.side, reasoning.text)
        spent = embedding.usage
        assert spent.tokens_in == len(reasoner.served.prompts.embed(asked).ids)
        assert len(reasoner.served.prompts.reason(item).ids) <= spent.cached_tokens
        assert spent.cached_tokens < spent.tokens_in
        assert (spent.stage, spent.within, spent.tokens_out) == ("embed", "reason", 0)
        assert spent.model_version == tiny_models.embedder().version
    assert usage.tokens_out == sum(r.tokens for r in reasonings)


def test_an_empty_reasoning_is_the_content_alone(reasoner):
    end = reasoner.served.prompts.stop_ids[0]
    items = [item for item in ITEMS if item.side is Side.QUERY]
    jobs = []
    for item in items:
        job = reasoner.prepare(item, 24, embed=True)
        # One token, whatever it is, read as the end of the turn: a model that has nothing to say.
        jobs.append(replace(job, max_tokens=1, embed=lambda _, ask=job.embed: ask([end])))
    made = [f.result(WAIT_S) for f in reasoner.loop.submit(jobs)]
    vectors = tiny_models.embedder().embed([EmbedItem(i.content, i.side) for i in items])
    assert_same([one.embedding for one in made], vectors)


def test_no_reasoning_is_no_embedding(reasoner):
    for budget in (0, 2):
        _, embeddings, usage = reasoner.reason_and_embed(ITEMS[:2], budget)
        assert embeddings == [None, None] and usage.tokens_in == 0


def test_what_the_embedder_reads_otherwise_is_left_to_it(reasoner):
    picture = Content.of("", png(1))
    forced = ReasonItem(Content.of("red", png(2)), Side.DOCUMENT, task=Task.COMPOSED)
    rewrite = ReasonItem(picture, Side.DOCUMENT, task=Task.REWRITE, query=Content.of("a cat"))
    plain = ReasonItem(picture, Side.DOCUMENT, task=Task.IMAGE)  # what it would be anyway
    _, embeddings, _ = reasoner.reason_and_embed([forced, rewrite, plain], 8)
    assert [e is None for e in embeddings] == [True, True, False]


def test_a_sequence_that_the_embedder_refuses_is_left_to_it(reasoner):
    long = ReasonItem(Content.of("cat " * 50), Side.QUERY)
    size = len(reasoner.served.prompts.reason(long).ids)
    assert size < 64 < size + 20
    reasonings, embeddings, _ = reasoner.reason_and_embed([long], 20)
    assert reasonings[0].tokens == 20 and embeddings == [None]


async def test_the_stage_embeds_and_the_cascade_can_see_that_it_does(reasoner):
    stage = LocalReasoner(reasoner)
    assert isinstance(stage, EmbeddingReasonerStage)
    reasonings, embeddings, _ = await stage.reason_and_embed(ITEMS[:3], max_tokens=12)
    assert_same(embeddings, expected(ITEMS[:3], reasonings))


def test_only_a_model_of_both_roles_and_one_sequence_embeds(tmp_path):
    def opened(**spec) -> Reasoner:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        tiny_models.write_model(path, family="qwen3", roles=["reasoner", "embedder"])
        file = path / "tte.json"
        told = json.loads(file.read_text()) | spec
        file.write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
        return Reasoner.from_pretrained(path)

    both = opened()
    assert both.embeds and both.dimension == 64
    assert opened(role=None).embeds  # a directory that says nothing may be either
    for other in (opened(role=["reasoner"]), opened(role="reasoner"), opened(prompts="full")):
        assert not other.embeds and other.dimension == 0
        assert len([k for k in other.table._programs if k[0] == "embed_slots"]) == 0
        with pytest.raises(UnsupportedError, match="unified model") as caught:
            other.prepare(ITEMS[0], 8, embed=True)
        assert caught.value.reason == "NOT_UNIFIED"
