"""The stages in one process: the same results, deadlines and cancellation, on an event loop."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side, Task
from tte_jax.errors import DeadlineExceededError, InvalidInputError
from tte_jax.local import LocalEmbedder, LocalReasoner, LocalReranker
from tte_jax.reasoner import Delta, Finished
from tte_jax.stages import EmbedderStage, EmbedItem, ReasonerStage, ReasonItem, RerankerStage

CAT = ReasonItem(Content.of("a cat"), Side.QUERY)
DOG = ReasonItem(Content.of("a dog", tiny_models.png(1)), Side.QUERY)
WAIT_S = 60.0


@pytest.fixture
def held():
    """Holds back a role's device thread until told to go on."""
    releases = []

    def hold(role):
        go, entered, run = threading.Event(), threading.Event(), role.table.run

        def waiting(*arguments):
            entered.set()
            assert go.wait(WAIT_S)
            return run(*arguments)

        def release():
            go.set()
            role.table.__dict__.pop("run", None)

        role.table.run = waiting
        releases.append(release)
        return entered, release

    yield hold
    for release in releases:
        release()


async def test_the_stages_answer_as_the_roles_do():
    reasoner: ReasonerStage = LocalReasoner(tiny_models.reasoner())
    embedder: EmbedderStage = LocalEmbedder(tiny_models.embedder())
    reranker: RerankerStage = LocalReranker(tiny_models.reranker())
    reasonings, usage = await reasoner.reason([CAT, DOG], max_tokens=24, timeout_s=WAIT_S)
    assert reasonings == tiny_models.reasoner().reason([CAT, DOG], 24)
    assert usage.tokens_out == sum(r.tokens for r in reasonings)
    items = [EmbedItem(i.content, i.side, "<think>x</think>\nAnswer: y") for i in (CAT, DOG)]
    vectors, _ = await embedder.embed(items, dimension=8)
    np.testing.assert_allclose(vectors, tiny_models.embedder().embed(items, 8), atol=1e-5)
    scores, _ = await reranker.rerank("a cat", ["a cat", "a dog"])
    np.testing.assert_allclose(
        scores, tiny_models.reranker().score("a cat", ["a cat", "a dog"]), atol=1e-6
    )


async def test_many_callers_at_once_each_get_their_own():
    stage = LocalEmbedder(tiny_models.embedder())
    words = ["cat", "dog", "face", "red", "the thing", "yes", "no", "skin"] * 4
    items = [EmbedItem(Content.of(w), Side.QUERY) for w in words]
    results = await asyncio.gather(*(stage.embed([i]) for i in items))
    expected = tiny_models.embedder().embed(items)
    np.testing.assert_allclose(np.concatenate([v for v, _ in results]), expected, atol=1e-5)


async def test_a_deadline_ends_the_wait_and_the_queued_work_is_never_run(held):
    role = tiny_models.embedder()
    stage = LocalEmbedder(role)
    entered, release = held(role)
    running = asyncio.create_task(stage.embed([EmbedItem(CAT.content, Side.QUERY)]))
    await asyncio.to_thread(entered.wait, WAIT_S)
    batches = role.queue.stats.batches
    with pytest.raises(DeadlineExceededError):
        await stage.embed([EmbedItem(DOG.content, Side.QUERY)], timeout_s=0.05)
    release()
    await running
    await stage.embed([EmbedItem(CAT.content, Side.QUERY)])
    assert role.queue.stats.batches == batches + 2
    with pytest.raises(DeadlineExceededError):
        await stage.embed([EmbedItem(CAT.content, Side.QUERY)], timeout_s=0.0)


async def test_a_cancelled_caller_frees_its_slots_and_nobody_elses(held):
    role = tiny_models.reasoner()
    stage = LocalReasoner(role)
    expected = role.reason([DOG], 24)
    cancelled = role.loop.stats.cancelled
    entered, release = held(role)
    gone = asyncio.create_task(stage.reason([CAT, CAT], max_tokens=24))
    await asyncio.to_thread(entered.wait, WAIT_S)  # both are in a prefill right now
    stays = asyncio.create_task(stage.reason([DOG], max_tokens=24))
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    release()
    assert (await stays)[0] == expected
    assert role.loop.stats.cancelled == cancelled + 2
    assert role.loop.active == 0


async def test_the_stream_brings_deltas_then_results():
    stage = LocalReasoner(tiny_models.reasoner())
    events = [e async for e in stage.stream([CAT, DOG], max_tokens=24)]
    finished = {e.index: e.reasoning for e in events if isinstance(e, Finished)}
    assert [finished[0], finished[1]] == tiny_models.reasoner().reason([CAT, DOG], 24)
    for index in (0, 1):
        own = [e.text for e in events if isinstance(e, Delta) and e.index == index]
        assert "".join(own).strip() == finished[index].text
    quiet = [e async for e in stage.stream([CAT], max_tokens=24, deltas=False)]
    assert [type(e) for e in quiet] == [Finished]


async def test_one_bad_input_fails_the_request_and_leaves_nothing_behind():
    role = tiny_models.reasoner()
    stage = LocalReasoner(role)
    bad = ReasonItem(Content.of("", b""), Side.QUERY)
    with pytest.raises(InvalidInputError) as caught:
        await stage.reason([CAT, bad], max_tokens=24)
    assert caught.value.field == "inputs[1].content.parts[0].image.data"
    assert len(role.queue) == 0


async def test_only_work_that_no_query_waits_for_is_in_the_background(monkeypatch):
    seen = []

    def watch(role):
        put = role.queue.put

        def watching(entries, **kwargs):
            seen.extend(entry.background for entry in entries)
            put(entries, **kwargs)

        monkeypatch.setattr(role.queue, "put", watching)
        return role

    reasoner = LocalReasoner(watch(tiny_models.reasoner()))
    embedder = LocalEmbedder(watch(tiny_models.embedder()))
    reranker = LocalReranker(watch(tiny_models.reranker()))
    stored = ReasonItem(Content.of("", tiny_models.png(1)), Side.DOCUMENT)
    rewrite = replace(stored, task=Task.REWRITE, query=CAT.content)
    await reasoner.reason([CAT, stored, rewrite], max_tokens=6)
    await embedder.embed([EmbedItem(CAT.content, side) for side in (Side.QUERY, Side.DOCUMENT)])
    await reranker.rerank("a cat", ["a dog"])
    await reranker.rerank("a cat", ["a dog"], background=True)
    assert seen == [False, True, False, False, True, False, True]


async def test_the_loop_turns_while_the_device_is_busy(held):
    role = tiny_models.embedder()
    entered, release = held(role)
    task = asyncio.create_task(LocalEmbedder(role).embed([EmbedItem(CAT.content, Side.QUERY)]))
    await asyncio.to_thread(entered.wait, WAIT_S)
    for _ in range(100):  # would hang here if the loop waited for the device
        await asyncio.sleep(0)
    assert not task.done()
    release()
    await task
