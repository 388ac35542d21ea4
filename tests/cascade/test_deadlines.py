"""Searches that have little time, hanging stages and consumers that leave, on a virtual clock."""

import asyncio
from contextlib import aclosing

import pytest

from tests.cascade.fakes import (
    collect,
    run,
)
from tests.cascade.searching import BY_COSINE, RERANKED, System, degraded, ids
from tte_jax.cascade import Caps, SearchQuery
from tte_jax.cascade.planning import FINISH_S, Pace
from tte_jax.content import Content
from tte_jax.errors import (
    DeadlineExceededError,
)

# --- time ---


def test_reasoning_that_would_eat_the_deadline_is_cut_off_and_the_search_goes_on():
    system = System()
    system.reasoner.delay = 60.0
    first, last = system.search("aab", deadline_s=2.0)
    assert ids(first) == BY_COSINE
    assert degraded(last) == [("reason", "DEADLINE_EXCEEDED")]
    # 0.55 s are kept for an unmeasured first stage; reasoning had the rest, and shows in usage.
    assert last.usage[0].stage == "reason"
    assert last.usage[0].wall_s == pytest.approx(2.0 - 0.55)
    assert (last.stage, last.final) == (RERANKED, True)


def test_reasoning_known_to_be_too_slow_is_not_begun():
    system = System()
    system.cascade.pace = Pace({"embed": 0.1, "index": 0.1, "reason": 0.5}, reason_tokens=20)
    last = system.search("aab", deadline_s=2.0)[-1]
    assert system.reasoner.calls == 0
    assert degraded(last) == [("reason", "DEADLINE_NEAR")]
    assert last.stage is RERANKED
    # Without a deadline it runs.
    assert system.search("aab")[-1].degraded == ()


def test_a_slow_reranker_is_given_up_before_the_deadline():
    system = System()
    system.reranker.delay = 60.0
    started_to_end = {}

    async def main():
        loop = asyncio.get_running_loop()
        started = loop.time()
        query = SearchQuery(Content.of("ask"), deadline_s=3.0)
        updates = [(u, loop.time() - started) async for u in system.cascade.search(query)]
        started_to_end["end"] = updates[-1][1]
        return [u for u, _ in updates]

    first, last = run(main())
    assert started_to_end["end"] == pytest.approx(3.0 - FINISH_S)
    assert last.results == first.results
    assert degraded(last) == [("rerank", "DEADLINE_EXCEEDED")]
    assert system.reranker.cancelled == 1


def test_too_little_time_reranks_fewer():
    system = System()
    system.cascade.pace = Pace({"rerank": 0.2})
    first, last = system.search(deadline_s=0.6 + FINISH_S)  # 0.25 s each with slack: two
    scored = [c.id for c in last.results if c.rerank is not None]
    assert sorted(scored) == ["aab", "ab"]
    assert last.stage is RERANKED
    assert degraded(last) == [("rerank", "DEADLINE_NEAR")]
    assert "2 of 5" in last.degraded[0].message
    assert first.degraded == ()


def test_a_stage_that_hangs_is_given_up_at_its_cap():
    system = System(Caps(reason=7.0, rerank=4.0))
    system.reasoner.delay = system.reranker.delay = 1e6
    last = system.search("aab")[-1]
    assert degraded(last) == [
        ("reason", "DEADLINE_EXCEEDED"),
        ("rerank", "DEADLINE_EXCEEDED"),
    ]
    walls = {u.stage: u.wall_s for u in last.usage}
    assert walls["reason"] == pytest.approx(7.0)
    assert walls["rerank"] == pytest.approx(4.0)
    assert ids(last) == BY_COSINE


@pytest.mark.parametrize("stage", ["embedder", "index"])
def test_a_first_stage_that_hangs_is_deadline_exceeded(stage):
    system = System()
    getattr(system, stage).delay = 1e6
    with pytest.raises(DeadlineExceededError):
        system.search(deadline_s=3.0)


def test_a_deadline_that_has_passed_does_no_work():
    system = System()
    with pytest.raises(DeadlineExceededError, match="none is left"):
        system.search(deadline_s=0.01)
    assert system.reasoner.calls == system.embedder.calls == 0


def test_timeouts_are_passed_on_to_the_stages():
    system = System()
    system.reasoner.delay = 1.0
    system.search(deadline_s=10.0)
    assert system.reasoner.timeouts == [pytest.approx(10 - 0.55)]
    assert system.embedder.timeouts == [pytest.approx(9 - FINISH_S)]
    assert system.index.timeouts == [5.0]  # its cap
    assert system.reranker.timeouts == [pytest.approx(9 - FINISH_S)]


# --- cancellation ---


@pytest.mark.parametrize("stage", ["reasoner", "embedder", "index", "reranker"])
def test_cancelling_the_consumer_cancels_the_stage_call(stage):
    system = System()
    behaviour = getattr(system, stage)
    behaviour.delay = 1000.0

    async def main():
        task = asyncio.create_task(collect(system.cascade.search(SearchQuery(Content.of("ask")))))
        await asyncio.sleep(1.0)
        assert behaviour.running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (behaviour.running, behaviour.cancelled) == (0, 1)

    run(main())


def test_a_consumer_that_stops_after_the_first_ranking_pays_for_no_more():
    system = System()

    async def main():
        async with aclosing(system.cascade.search(SearchQuery(Content.of("ask")))) as updates:
            async for _ in updates:
                break
        assert len(asyncio.all_tasks()) == 1

    run(main())
    assert system.reranker.calls == 0
