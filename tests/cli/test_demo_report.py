"""The demo's verdict: a stage that did not really run is always noticed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from training.data import splits
from training.data.concepts import family_key, normalise_key
from tte_jax.builtin import openmoji, twemoji
from tte_jax.cascade.messages import Degraded, SearchStage, SearchUpdate
from tte_jax.cli.demo_queries import COMPOSED, IMAGE, KINDS, QUERIES, TEXT, DemoQuery
from tte_jax.cli.demo_report import Answer, answer_json, as_json, not_run, rank_of, sheet_rows
from tte_jax.content import NO_REASONING, Candidate, Reasoning, Usage

ECR = Reasoning("<think>cat</think>\nAnswer: cat", "cat", "cat", tokens=6)
QUERY = DemoQuery(TEXT, "a smiling cat", "", ("1F63A",))


def usage(*stages: str) -> tuple[Usage, ...]:
    return tuple(Usage(stage, tokens_in=9, tokens_out=6 * (stage == "reason")) for stage in stages)


def candidates(rerank: bool) -> tuple[Candidate, ...]:
    ids = ("1F63B", "1F63A", "1F600")
    scores = (0.9, 0.7, None) if rerank else (None, None, None)
    order = (1, 0, 2) if rerank else (0, 1, 2)
    return tuple(
        Candidate(f"openmoji:{ids[i]}", 0.9 - i / 10, scores[n], ECR) for n, i in enumerate(order)
    )


FIRST = SearchUpdate(
    SearchStage.FIRST_STAGE, candidates(False), False, ECR, usage("reason", "embed", "index")
)
LAST = SearchUpdate(
    SearchStage.RERANKED, candidates(True), True, ECR, usage("reason", "embed", "index", "rerank")
)


def answer(last: SearchUpdate = LAST) -> Answer:
    return Answer(QUERY, ((0.1, FIRST), (0.2, last)))


def test_a_complete_search_has_no_problem() -> None:
    assert not_run(answer()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query_reasoning": NO_REASONING}, "no ECR"),
        ({"usage": usage("reason", "embed", "index")}, "rerank"),
        ({"usage": usage("embed", "index", "rerank")}, "reason"),
        ({"usage": (*usage("embed", "index", "rerank"), Usage("reason", 9, 0))}, "no tokens"),
        ({"usage": (*usage("reason", "index", "rerank"), Usage("embed", 0))}, "embed read no"),
        ({"degraded": (Degraded("rerank", "UNAVAILABLE", "it is down"),)}, "it is down"),
        ({"results": ()}, "index is empty"),
        ({"results": candidates(False)}, "not reranked"),
        ({"stage": SearchStage.FIRST_STAGE}, "not reranked"),
        ({"final": False}, "final"),
        (
            {"results": tuple(dataclasses.replace(c, reasoning=NO_REASONING)
                              for c in candidates(True))},
            "no document found has an ECR",
        ),
    ],
)  # fmt: skip
def test_each_missing_stage_is_named(change: dict[str, object], named: str) -> None:
    problems = not_run(answer(dataclasses.replace(LAST, **change)))
    assert any(named in p for p in problems), problems


def test_no_answer_at_all_is_a_problem() -> None:
    assert not_run(Answer(QUERY, ())) == ["the gateway sent no answer"]


def test_json_holds_ranks_scores_and_reasons() -> None:
    made = json.loads(json.dumps(answer_json(answer())))
    assert made["ranked_ids"] == ["openmoji:1F63A", "openmoji:1F63B", "openmoji:1F600"]
    assert made["rank_found"] == {"first_stage": 2, "final": 1}
    assert [r["rerank"] for r in made["results"]] == [0.9, 0.7, None]
    assert [r["cosine"] for r in made["results"]] == pytest.approx([0.8, 0.9, 0.7])
    assert made["query_reasoning"]["think"] == "cat"
    assert made["results"][0]["reasoning"]["answer"] == "cat"
    assert [u["stage"] for u in made["usage"]] == ["reason", "embed", "index", "rerank"]
    assert [u["stage"] for u in made["updates"]] == ["first_stage", "reranked"]
    assert made["problems"] == []


def test_the_report_counts_hits_before_and_after_reranking() -> None:
    report = as_json([answer()], corpus={"documents": 3}, services_ready_s=1.5)
    assert report["summary"][TEXT] == {
        "queries": 1,
        "first_stage": {"hit@1": 0, "hit@10": 1},
        "final": {"hit@1": 1, "hit@10": 1},
    }
    assert report["summary"][IMAGE]["queries"] == 0
    assert report["problems"] == []
    bad = as_json([answer(FIRST)])
    assert bad["problems"] and all(QUERY.text in p for p in bad["problems"])


def test_rank_of_the_best_right_answer() -> None:
    assert rank_of(("openmoji:1F600", "openmoji:1F63B"), LAST) == 2
    assert rank_of(("openmoji:absent",), LAST) is None


def test_the_sheet_marks_right_answers_and_first_stage_ranks() -> None:
    (row,) = sheet_rows([answer()], lambda id: id.encode(), shown=2)
    assert [f.picture for f in row.found] == [b"openmoji:1F63A", b"openmoji:1F63B"]
    assert [f.right for f in row.found] == [True, False]
    assert [f.first_rank for f in row.found] == [2, 1]


def test_the_queries_cover_every_kind_and_can_be_asked_and_answered() -> None:
    corpus = {e.id: e for e in openmoji.entries()}
    assert {q.kind for q in QUERIES} == set(KINDS)
    for query in QUERIES:
        assert query.expected and set(query.expected_ids) <= set(corpus), query
        assert bool(query.picture) == (query.kind in (IMAGE, COMPOSED))
        assert bool(query.text) == (query.kind in (TEXT, COMPOSED))
        if query.picture:
            assert twemoji.picture(query.picture)
        if query.kind == COMPOSED:
            assert query.picture not in query.expected, "the change must change something"
            asked, (right,) = corpus[f"openmoji:{query.picture}"], query.expected_ids
            assert asked.shown.family == corpus[right].shown.family
            assert corpus[right].shown.skin in query.text


def test_what_the_demo_calls_held_out_is_in_the_training_lists() -> None:
    held_out = splits.read()
    for query in QUERIES:
        (key, *_) = (normalise_key(hexcode) for hexcode in query.expected)
        shown = openmoji.entry(query.expected_ids[0]).shown
        family = family_key(key, people=shown.group == "people-body")
        combination = f"{family}|{shown.gender}|{shown.skin}"
        unseen = family in held_out.families or combination in held_out.combinations
        assert unseen == query.unseen, (query, combination)
