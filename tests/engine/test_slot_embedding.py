"""Embeddings out of decode slots against the embedder's, with a tiny real model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.embedder import EmbedJob
from tte_jax.engine.executables import backend_compiles
from tte_jax.engine.inputs import ModelInput
from tte_jax.engine.jobs import NEVER
from tte_jax.engine.slot_embedding import LONG, SHORT, continuation
from tte_jax.stages import GREEDY, ReasonItem, Sampling

WAIT_S = 60.0
DRAWN = Sampling(temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def reasoner():
    role = tiny_models.reasoner()
    yield role
    assert role.loop.active == 0 and len(role.queue) == 0, "a test left work behind"


def item(text: str = "", *images: int) -> ReasonItem:
    return ReasonItem(Content.of(text, *(tiny_models.png(i) for i in images)), Side.QUERY)


ITEMS = [item("a cat"), item("", 1), item("red", 2), item("the smiling dog face"), item("", 3, 4)]


def text_input(ids: list[int], media: list[bool]) -> ModelInput:
    """A prompt whose vision tokens share one position, as a picture of one patch high would."""
    flags = np.array(media)
    return ModelInput(
        ids=np.array(ids, np.int32),
        positions=np.zeros((3, len(ids)), np.int32),
        next_pos=int((~flags).sum()) + int(flags.any()),
        images=(),
        is_media=flags,
    )


ASKED = text_input([1, 9, 9, 9, 2, 3], [False, True, True, True, False, False])  # next position 4


@pytest.mark.parametrize(
    ("generated", "wanted", "reused", "ids", "position"),
    [
        ([5, 6, 0], [5, 6, 0], 8, [0], 6),  # the model ended it
        ([5, 6, 7], [5, 6, 7, 0], 8, [7, 0], 6),  # the budget did: the last was never read
        ([0], [0], 6, [0], 4),  # an empty reasoning
        ([5, 6, 7, 0], [5, 8, 0], 7, [8, 0], 5),  # spelled otherwise
        ([5, 6, 7, 0], [5, 0], 7, [0], 5),  # cut before a stop text
        ([5, 6, 7, 0], [5, 6], 7, [6], 5),  # all of it was read: the last one runs again
    ],
)
def test_only_what_the_slot_has_not_read_follows(generated, wanted, reused, ids, position):
    found = continuation(ASKED, generated, np.array([*ASKED.ids, *wanted], np.int32))
    assert found is not None
    assert (found.reused, found.ids.tolist(), found.position) == (reused, ids, position)
    assert found.tokens == len(ASKED.ids) + len(wanted)


def test_text_of_the_prompt_may_be_spelled_otherwise_but_no_image():
    def wanted(*ids: int) -> np.ndarray:
        return np.array(ids, np.int32)

    found = continuation(ASKED, [5, 0], wanted(1, 9, 9, 9, 2, 7, 5, 0))
    assert found is not None
    assert (found.reused, found.position) == (5, 3)
    found = continuation(ASKED, [5, 0], wanted(1, 9, 9, 9, 7))
    assert found is not None
    assert (found.reused, found.position) == (4, 2)
    assert continuation(ASKED, [5, 0], wanted(1, 9, 9, 7, 2, 3, 5, 0)) is None
    assert continuation(ASKED, [5, 0], wanted(7, 9, 9, 9, 2, 3, 5, 0)) is None
    words = text_input([1, 2], [False, False])
    assert continuation(words, [5], wanted(7, 8)) is None  # not even the first is the same


def embedded(reasoner, items, budget, sampling=GREEDY, *, close_at=NEVER, rest=()):
    """(slot's vector, embedder's) of each prompt with its generated ids, `rest` and the end."""
    end = reasoner.served.prompts.stop_ids[0]
    jobs = []
    for one in items:
        job = reasoner.prepare(one, 24, sampling=sampling)

        def following(tokens, job=job):
            wanted = [*job.input.ids, *(t for t in tokens if t != end), *rest, end]
            return continuation(job.input, tokens, np.array(wanted, np.int32))

        jobs.append(replace(job, max_tokens=budget, close_at=close_at, embed=following))
    made = [f.result(WAIT_S) for f in reasoner.loop.submit(jobs, wait=True)]
    inputs = []
    for job, one in zip(jobs, made, strict=True):
        asked, new = job.input, [*(t for t in one.tokens if t != end), *rest, end]
        places = asked.next_pos + np.arange(len(new), dtype=np.int32)
        inputs.append(
            replace(
                asked,
                ids=np.concatenate([asked.ids, np.array(new, np.int32)]),
                positions=np.concatenate([asked.positions, np.tile(places, (3, 1))], axis=1),
                is_media=np.concatenate([asked.is_media, np.zeros(len(new), bool)]),
            )
        )
    futures = tiny_models.embedder().submit([EmbedJob(one) for one in inputs])
    return made, [f.result(WAIT_S).vector for f in futures]


@pytest.mark.parametrize("budget", [1, 2, 7, 18])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_slots_embed_what_the_embedder_does(reasoner, budget, sampling):
    tiny_models.embedder()
    compiles = backend_compiles()
    made, expected = embedded(reasoner, ITEMS, budget, sampling)
    for one, vector in zip(made, expected, strict=True):
        assert one.embedding is not None
        assert one.embedding.tokens - one.embedding.reused <= SHORT
        np.testing.assert_allclose(one.embedding.vector, vector, rtol=0, atol=1e-5)
    vectors = np.stack(expected)
    assert (vectors @ vectors.T - np.eye(len(vectors))).max() < 0.99
    assert budget < 7 or len({tuple(one.tokens) for one in made}) > 1
    assert backend_compiles() == compiles


def test_after_a_forced_close_too(reasoner):
    made, expected = embedded(reasoner, ITEMS, 12, close_at=4)
    assert all(one.forced for one in made)
    for one, vector in zip(made, expected, strict=True):
        np.testing.assert_allclose(one.embedding.vector, vector, rtol=0, atol=1e-5)


@pytest.mark.parametrize("extra", [5, LONG - 2])
def test_a_longer_rest_is_run_in_a_longer_program(reasoner, extra):
    made, expected = embedded(reasoner, ITEMS[:2], 4, rest=[7] * extra)
    for one, vector in zip(made, expected, strict=True):
        assert one.embedding.tokens - one.embedding.reused == extra + 2
        np.testing.assert_allclose(one.embedding.vector, vector, rtol=0, atol=1e-5)


def test_a_rest_beyond_every_program_is_left_to_the_embedder(reasoner):
    embeddings = reasoner.loop.stats.embedded
    made, _ = embedded(reasoner, ITEMS[:2], 4, rest=[7] * (LONG - 1))
    assert [one.embedding for one in made] == [None, None]
    assert all(len(one.tokens) == 4 for one in made)
    assert reasoner.loop.stats.embedded == embeddings


def watched(reasoner, monkeypatch):
    """The shapes of the `embed_slots` that run."""
    run, shapes = reasoner.table.run, []

    def watching(name, key, *arguments):
        if name == "embed_slots":
            shapes.append(key)
        return run(name, key, *arguments)

    monkeypatch.setattr(reasoner.table, "run", watching, raising=False)
    return shapes


def test_slots_that_end_together_are_embedded_together(reasoner, monkeypatch):
    shapes = watched(reasoner, monkeypatch)
    slots = reasoner.served.buckets.slots
    made, _ = embedded(reasoner, [item("a cat"), item("a dog"), item("a face")], 8)
    assert len({one.embedding.compute_s for one in made}) == 1
    assert shapes == [(slots, SHORT)]


def test_a_slot_alone_does_not_pay_for_all(reasoner, monkeypatch):
    shapes = watched(reasoner, monkeypatch)
    embedded(reasoner, ITEMS[:1], 8)
    assert shapes == [(1, SHORT)]


def test_nobody_pays_who_did_not_ask(reasoner, monkeypatch):
    shapes = watched(reasoner, monkeypatch)
    reasoner.reason(ITEMS, 8)
    assert shapes == []


def test_a_slot_that_cannot_be_embedded_still_gives_its_reasoning(reasoner, monkeypatch, caplog):
    def broken(_tokens):
        raise RuntimeError("cannot say")

    job = reasoner.prepare(ITEMS[0], 8)
    (future,) = reasoner.loop.submit([replace(job, embed=broken)])
    made = future.result(WAIT_S)
    assert made.embedding is None and len(made.tokens) == 8
    assert "could not be embedded" in caplog.text

    run = reasoner.table.run

    def poisoned(name, *arguments):
        out = run(name, *arguments)
        return np.full_like(out, np.nan) if name == "embed_slots" else out

    monkeypatch.setattr(reasoner.table, "run", poisoned, raising=False)
    made, _ = embedded(reasoner, ITEMS[:1], 8)
    assert made[0].embedding is None and len(made[0].tokens) == 8


def test_reused_tokens_are_counted_as_cached(reasoner):
    before = reasoner.queue.stats.cached_tokens
    made, _ = embedded(reasoner, [item("a thing")], 8)
    assert reasoner.queue.stats.cached_tokens == before + made[0].embedding.reused
