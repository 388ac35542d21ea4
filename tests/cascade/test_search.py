"""Search over fake stages with hand-computable answers, on a virtual clock."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from tests.cascade.fakes import (
    Behaviour,
    FakeEmbedder,
    FakeIndex,
    FakeReasoner,
    FakeReranker,
    collect,
    ecr,
    run,
)
from tte_jax.cascade import Caps, Cascade, Include, SearchQuery, SearchStage
from tte_jax.cascade.planning import FINISH_S, Pace
from tte_jax.content import NO_REASONING, Budget, Content, Reasoning, Side, Task, Usage
from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from tte_jax.filters import Equals, Range

FIRST, REWRITTEN, RERANKED = SearchStage.FIRST_STAGE, SearchStage.REWRITTEN, SearchStage.RERANKED


class System:
    """A cascade over fakes, with five documents: `aab ab abb bbbb cc`."""

    def __init__(self, caps: Caps | None = None) -> None:
        self.reasoner = FakeReasoner({"ask": ecr("think of", "aab")})
        self.embedder = FakeEmbedder()
        self.index = FakeIndex()
        self.reranker = FakeReranker()
        for id in ("aab", "ab", "abb", "bbbb", "cc"):
            self.index.put(id, ecr(f"seen {id}", id))
        self.cascade = Cascade(self.reasoner, self.embedder, self.index, self.reranker, caps=caps)

    def search(self, text: str = "ask", **query):
        query = SearchQuery(query.pop("content", Content.of(text)), **query)
        return run(collect(self.cascade.search(query)))


def ids(update):
    return [candidate.id for candidate in update.results]


def degraded(update):
    return [(d.stage, d.reason) for d in update.degraded]


# By cosine with (2, 1): aab 1, ab .949, abb .8, bbbb .447, cc 0.
BY_COSINE = ["aab", "ab", "abb", "bbbb", "cc"]


def test_the_first_stage_comes_first_and_the_reranked_head_before_the_tail():
    system = System()
    system.reranker.table = {
        "seen aab. Answer: aab": 0.1,
        "seen ab. Answer: ab": 0.2,
        "seen abb. Answer: abb": 0.9,
    }
    first, last = system.search(budget=Budget(rerank_depth=3))
    assert (first.stage, first.final, ids(first)) == (FIRST, False, BY_COSINE)
    assert [c.rerank for c in first.results] == [None] * 5
    assert first.results[1].cosine == pytest.approx(3 / np.sqrt(10))
    assert (last.stage, last.final, last.degraded) == (RERANKED, True, ())
    assert ids(last) == ["abb", "ab", "aab", "bbbb", "cc"]
    scores = [c.rerank for c in last.results]
    assert scores[:3] == pytest.approx([0.9, 0.2, 0.1])
    assert scores[3:] == [None, None]
    assert last.query_reasoning == ecr("think of", "aab")
    # The reranker read texts without tags: the query's ECR against the candidates'.
    assert system.reranker.pairs[0] == ("think of. Answer: aab", "seen aab. Answer: aab")


def test_what_the_stages_are_asked():
    system = System()
    system.search(
        instruction="find it",
        budget=Budget(reasoning_tokens=9, candidates=4, rerank_depth=2),
        filter=Range("n", at_least=3),
    )
    (reasoned,) = system.reasoner.items
    assert (reasoned.side, reasoned.instruction, reasoned.task) == (Side.QUERY, "find it", None)
    assert system.reasoner.max_tokens == [9]
    (embedded,) = system.embedder.items
    assert embedded.reasoning == "<think>think of</think>\nAnswer: aab"
    assert (embedded.side, embedded.instruction) == (Side.QUERY, "find it")


def test_filter_top_k_and_candidates():
    system = System()
    updates = system.search(filter=Range("n", at_least=3), budget=Budget(rerank_depth=0))
    assert ids(updates[0]) == ["aab", "abb", "bbbb"]
    last = system.search(top_k=2, budget=Budget(candidates=3, rerank_depth=3))[-1]
    assert len(last.results) == 2
    # A top_k above the candidates raises them.
    assert len(system.search(top_k=5, budget=Budget(candidates=1))[0].results) == 5
    (nothing,) = system.search(filter=Equals("n", 99))
    assert (nothing.results, nothing.final, nothing.degraded) == ((), True, ())


def test_equal_scores_keep_the_first_stage_order():
    system = System()
    system.reranker.table = {f"seen {id}. Answer: {id}": 0.5 for id in BY_COSINE}
    system.reranker.table["seen bbbb. Answer: bbbb"] = 0.7
    assert ids(system.search()[-1]) == ["bbbb", "aab", "ab", "abb", "cc"]


def test_reasoning_off_embeds_the_query_itself():
    system = System()
    first, last = system.search("cc", budget=Budget(reasoning_tokens=0))
    assert system.reasoner.calls == 0
    assert ids(first)[0] == "cc"
    assert first.query_reasoning == NO_REASONING
    assert last.stage is RERANKED
    assert {query for query, _ in system.reranker.pairs} == {"cc"}
    assert last.degraded == ()  # switched off is not degraded


def test_with_nothing_to_refine_there_is_one_message():
    (only,) = System().search(budget=Budget(rerank_depth=0))
    assert (only.stage, only.final) == (FIRST, True)


def test_usage_of_every_stage_with_wall_queue_and_compute_times():
    system = System()
    system.reasoner.delay, system.embedder.delay = 2.0, 0.5
    first, last = system.search()
    assert [u.stage for u in first.usage] == ["reason", "embed", "index"]
    assert [u.stage for u in last.usage] == ["reason", "embed", "index", "rerank"]
    reason, embed, _, rerank = last.usage
    assert (reason.tokens_in, reason.tokens_out, reason.cached_tokens) == (7, 4, 1)
    assert (reason.queue_s, reason.compute_s, reason.model_version) == (0.25, 0.5, "reasoner-1")
    assert (reason.wall_s, embed.wall_s) == (pytest.approx(2.0), pytest.approx(0.5))
    assert (rerank.tokens_in, rerank.cached_tokens) == (55, 3)


def test_include_leaves_out_what_is_not_wanted():
    system = System()
    last = system.search(include=Include(reasoning=False, timings=False))[-1]
    assert last.usage == ()
    assert last.query_reasoning == NO_REASONING
    assert {c.reasoning for c in last.results} == {NO_REASONING}
    assert last.stage is RERANKED  # the reranker still had the ECRs
    assert last.results[0].metadata == {"n": 3}


# --- query-aware rewrites ---


def test_rewrites_of_the_top_replace_their_ecrs_in_the_rerank():
    system = System()
    system.reasoner.table["ab|ask"] = ecr("now I see", "wanted")
    system.reasoner.table["aab|ask"] = Reasoning("", "", "")  # an empty rewrite falls back
    first, rewritten, last = system.search(budget=Budget(rewrite_depth=2, rewrite_tokens=8))
    assert (rewritten.stage, rewritten.final) == (REWRITTEN, False)
    assert ids(rewritten) == ids(first) == BY_COSINE
    assert [c.rewrite for c in rewritten.results] == [
        None, ecr("now I see", "wanted"), None, None, None,
    ]  # fmt: skip
    assert rewritten.results[1].reasoning == ecr("seen ab", "ab")
    texts = [candidate for _, candidate in system.reranker.pairs]
    assert texts[:3] == [
        "seen aab. Answer: aab", "now I see. Answer: wanted", "seen abb. Answer: abb",
    ]  # fmt: skip
    assert last.stage is RERANKED
    assert system.reasoner.max_tokens == [64, 8]
    item = system.reasoner.items[1]
    assert (item.task, item.side) == (Task.REWRITE, Side.DOCUMENT)
    assert item.content == Content.of("aab")
    assert item.query == Content.of("ask")
    assert item.query_reasoning == ecr("think of", "aab").text
    assert item.candidate_reasoning == ecr("seen aab", "aab").text
    assert [u.stage for u in last.usage] == [
        "reason", "embed", "index", "fetch", "rewrite", "rerank",
    ]  # fmt: skip


def test_rewrites_without_a_rerank_end_the_search():
    first, last = System().search(budget=Budget(rewrite_depth=1, rerank_depth=0))
    assert (last.stage, last.final) == (REWRITTEN, True)
    assert last.results[0].rewrite is not None


def test_a_document_deleted_meanwhile_is_not_rewritten():
    system = System()
    entry = system.index.entries["aab"]

    async def gone(ids, *, timeout_s=None):
        return [None if id == "aab" else system.index.entries[id].document for id in ids]

    system.index.get = gone
    rewritten = system.search(budget=Budget(rewrite_depth=2))[1]
    assert [c.rewrite is None for c in rewritten.results] == [True, False, True, True, True]
    assert entry.document.id == rewritten.results[0].id


@pytest.mark.parametrize(
    ("sick", "stages"),
    [
        ("fetch", [("fetch", "UNAVAILABLE")]),
        ("rewrite", [("rewrite", "UNAVAILABLE")]),
    ],
)
def test_a_failed_rewrite_leaves_the_plain_ecrs(sick, stages):
    system = System()
    if sick == "fetch":
        system.index.get_behaviour = Behaviour(broken=UnavailableError("away"))
    else:
        reason = system.reasoner.reason

        async def only_queries(items, **kwargs):
            if items[0].task is Task.REWRITE:
                raise UnavailableError("away")
            return await reason(items, **kwargs)

        system.reasoner.reason = only_queries
    first, last = system.search(budget=Budget(rewrite_depth=2))
    assert (last.stage, last.final) == (RERANKED, True)
    assert degraded(last) == stages
    assert all(c.rewrite is None for c in last.results)
    assert first.degraded == ()


@pytest.mark.parametrize(
    ("unreadable", "rewritten", "message"),
    [
        ({"aab"}, {"ab", "abb"}, "1 of 3 candidates could not be read by the reasoner"),
        ({"aab", "abb"}, {"ab"}, "2 of 3 candidates could not be read by the reasoner"),
        ({"aab", "ab", "abb"}, set(), "3 of 3 candidates could not be read by the reasoner"),
    ],
)
def test_a_candidate_that_cannot_be_rewritten_is_left_out_alone(unreadable, rewritten, message):
    system = System()
    reason = system.reasoner.reason

    async def broken_images(items, **kwargs):
        for i, item in enumerate(items):
            if item.task is Task.REWRITE and item.content.text in unreadable:
                field = f"inputs[{i}].content.parts[0].image.data"
                raise InvalidInputError("cut short", field=field, reason="BROKEN_IMAGE")
        return await reason(items, **kwargs)

    system.reasoner.reason = broken_images
    last = system.search(budget=Budget(rewrite_depth=3))[-1]
    assert {c.id for c in last.results if c.rewrite is not None} == rewritten
    assert (last.stage, degraded(last)) == (RERANKED, [("rewrite", "BROKEN_IMAGE")])
    assert last.degraded[0].message.startswith(message)


def test_a_rewrite_refused_for_its_query_fails_as_a_whole():
    system = System()
    calls = []
    reason = system.reasoner.reason

    async def bad_query(items, **kwargs):
        if items[0].task is Task.REWRITE:
            calls.append(len(items))
            raise InvalidInputError("too long", field="inputs[0].rewrite.query", reason="TOO_LONG")
        return await reason(items, **kwargs)

    system.reasoner.reason = bad_query
    last = system.search(budget=Budget(rewrite_depth=3))[-1]
    assert calls == [3]
    assert degraded(last) == [("rewrite", "TOO_LONG")]


# --- candidates and queries without an ECR ---


def test_a_candidate_without_ecr_is_read_by_its_text_and_an_image_is_not_scored():
    system = System()
    system.index.put("raw", NO_REASONING, Content.of("aab words"))
    system.index.put("picture", NO_REASONING, Content.of("", b"png"))
    last = system.search(budget=Budget(rerank_depth=7))[-1]
    assert ("think of. Answer: aab", "aab words") in system.reranker.pairs
    scores = {c.id: c.rerank for c in last.results}
    assert scores["raw"] is not None
    assert scores["picture"] is None
    assert ids(last)[-1] == "picture"  # behind all that were scored
    assert last.degraded == ()


def test_a_query_without_any_text_is_not_reranked_and_says_so():
    system = System()
    query = Content.of("", b"aab")
    last = system.search(content=query, budget=Budget(reasoning_tokens=0))[-1]
    assert (last.stage, last.final, ids(last)) == (FIRST, True, BY_COSINE)
    assert degraded(last) == [("rerank", "NO_QUERY_TEXT")]
    assert system.reranker.calls == 0


# --- sick stages ---


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (UnavailableError("connection refused"), "UNAVAILABLE", "is not available"),
        (OverloadedError("queue of 64 is full"), "OVERLOADED", "is overloaded"),
        (InternalError("NaN"), "INTERNAL", "failed"),
        (ZeroDivisionError("secret detail"), "INTERNAL", "failed"),
    ],
)
def test_a_sick_reasoner_costs_only_the_reasoning(error, reason, said):
    system = System()
    system.reasoner.broken = error
    first, last = system.search("aab")
    assert system.embedder.items[0].reasoning == ""
    assert ids(first) == BY_COSINE
    assert (last.stage, last.final) == (RERANKED, True)
    (entry,) = last.degraded
    assert (entry.stage, entry.reason) == ("reason", reason)
    assert said in entry.message and "without reasoning" in entry.message
    assert str(error) not in entry.message
    assert first.degraded == last.degraded


@pytest.mark.parametrize("error", [UnavailableError("away"), OverloadedError("full")])
def test_a_sick_reranker_leaves_the_first_stage_order(error):
    system = System()
    system.reranker.broken = error
    first, last = system.search()
    assert (last.stage, last.final) == (FIRST, True)
    assert last.results == first.results
    assert degraded(last) == [("rerank", error.reason)]
    assert "first-stage order" in last.degraded[0].message
    assert first.degraded == ()


@pytest.mark.parametrize("scores", [[0.5, float("nan")], [0.5, float("inf")], [0.5]])
def test_scores_that_are_no_numbers_are_never_sorted(scores):
    system = System()
    rerank = system.reranker.rerank

    async def broken(*args, **kwargs):
        _, usage = await rerank(*args, **kwargs)
        return np.array(scores, np.float32), usage

    system.reranker.rerank = broken
    first, last = system.search(budget=Budget(rerank_depth=2))
    assert last.results == first.results
    assert (last.stage, last.final) == (FIRST, True)
    assert degraded(last) == [("rerank", "NOT_FINITE")]


@pytest.mark.parametrize("stage", ["embedder", "index"])
def test_without_embedder_or_index_the_search_fails_with_their_error(stage):
    system = System()
    getattr(system, stage).broken = UnavailableError("the service is down", retry_after_s=3)
    with pytest.raises(UnavailableError, match="the service is down"):
        system.search()


def test_a_query_vector_that_is_no_number_is_an_internal_error():
    system = System()

    async def embed(items, **kwargs):
        return np.full((1, 26), np.nan, np.float32), Usage("embed")

    system.embedder.embed = embed
    with pytest.raises(InternalError, match="unusable vector"):
        system.search()


def test_an_unreadable_image_is_the_querys_fault_with_its_field():
    system = System()
    system.reasoner.broken = InvalidInputError(
        "inputs[0].content.parts[1].image.data is not an image",
        field="inputs[0].content.parts[1].image.data",
        reason="UNREADABLE_IMAGE",
    )
    with pytest.raises(InvalidInputError) as caught:
        system.search()
    assert caught.value.field == "query.parts[1].image.data"
    assert caught.value.reason == "UNREADABLE_IMAGE"
    assert caught.value.message == "query.parts[1].image.data is not an image"
    assert system.embedder.calls == 0


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"content": Content(())}, "query"),
        ({"content": Content.of("   ")}, "query"),
        ({"top_k": 0}, "top_k"),
        ({"budget": Budget(candidates=0)}, "budget.candidates"),
        ({"budget": Budget(rerank_depth=-1)}, "budget.rerank_depth"),
        ({"budget": Budget(rewrite_depth=1, rewrite_tokens=0)}, "budget.rewrite_tokens"),
    ],
)
def test_wrong_queries_are_refused_before_any_work(query, field):
    system = System()
    with pytest.raises(InvalidInputError) as caught:
        system.search(**query)
    assert caught.value.field == field
    assert system.reasoner.calls == system.embedder.calls == 0


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


def test_concurrent_searches_do_not_mix():
    system = System()
    system.reasoner.delay = 1.0
    system.reasoner.table |= {"x": ecr("", "cc"), "y": ecr("", "bbbb")}

    async def main():
        search = system.cascade.search
        return await asyncio.gather(
            *(collect(search(SearchQuery(Content.of(text)))) for text in ("x", "y", "ask"))
        )

    x, y, ask = run(main())
    assert [ids(updates[0])[0] for updates in (x, y, ask)] == ["cc", "bbbb", "aab"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("inputs[0].content", "query"),
        ("inputs[0].instruction", "instruction"),
        ("vector", "vector"),
        ("", ""),
    ],
)
def test_fields_of_the_stages_are_fields_of_the_query(field, expected):
    system = System()
    system.embedder.broken = InvalidInputError("too long", field=field)
    with pytest.raises(InvalidInputError) as caught:
        system.search()
    assert caught.value.field == expected


def too_long(*ids: str):
    """A reranker that refuses these candidates' texts, one at a time, as the real one does."""

    def refuse(candidates):
        for at, text in enumerate(candidates):
            if text.split(": ")[-1] in ids:
                raise InvalidInputError("too long", field=f"candidates[{at}]", reason="TOO_LONG")

    return refuse


def test_a_candidate_that_the_reranker_cannot_read_is_left_out_alone():
    system = System()
    system.reranker.refuse = too_long("aab", "abb")
    system.reranker.table = {
        "seen ab. Answer: ab": 0.1,
        "seen bbbb. Answer: bbbb": 0.6,
        "seen cc. Answer: cc": 0.5,
    }
    last = system.search()[-1]
    assert (last.stage, ids(last)) == (RERANKED, ["bbbb", "cc", "ab", "aab", "abb"])
    assert [c.rerank is None for c in last.results] == [False, False, False, True, True]
    assert degraded(last) == [("rerank", "TOO_LONG")]
    assert "2 of 5" in last.degraded[0].message


def test_when_no_candidate_can_be_read_the_first_stage_stands():
    system = System()
    system.reranker.refuse = too_long(*BY_COSINE)
    first, last = system.search()
    assert (last.stage, last.results) == (FIRST, first.results)
    assert degraded(last) == [("rerank", "TOO_LONG")]


def test_a_query_that_the_reranker_cannot_read_is_a_failed_rerank():
    system = System()
    system.reranker.broken = InvalidInputError("too long", field="query", reason="TOO_LONG")
    first, last = system.search()
    assert last.results == first.results
    assert degraded(last) == [("rerank", "TOO_LONG")]
    assert system.reranker.calls == 1
