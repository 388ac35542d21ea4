"""Search over fake stages with hand-computable answers, on a virtual clock."""

import asyncio

import numpy as np
import pytest

from tests.cascade.fakes import (
    collect,
    ecr,
    run,
)
from tests.cascade.searching import BY_COSINE, FIRST, RERANKED, System, degraded, ids
from tte_jax.cascade import Include, SearchQuery
from tte_jax.content import NO_REASONING, Budget, Content, Side, Usage
from tte_jax.errors import (
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from tte_jax.filters import Equals, Range


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
