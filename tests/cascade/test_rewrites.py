"""Rewriting the first candidates for a query, over fake stages."""

from dataclasses import replace

import pytest

from tests.cascade.fakes import (
    Behaviour,
    ecr,
)
from tests.cascade.searching import BY_COSINE, RERANKED, REWRITTEN, System, degraded, ids
from tte_jax.cascade import batches
from tte_jax.content import Budget, Content, Reasoning, Side, Task
from tte_jax.errors import (
    InvalidInputError,
    UnavailableError,
)

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


def test_candidates_whose_media_fill_several_messages_are_rewritten_in_parts(monkeypatch):
    """Each goes with a copy of the query; 4 + 2 bytes make six, and a message holds 14."""
    monkeypatch.setattr(batches, "MAX_MESSAGE_BYTES", batches.ROOM + 14)
    system = System()
    for id in BY_COSINE:
        entry = system.index.entries[id]
        picture = Content.of("", id.ljust(4, "_").encode())
        changed = replace(entry.document, content=picture)
        system.index.entries[id] = replace(entry, document=changed)
    system.reasoner.table["ask"] = ecr("think of", "aab")
    query = Content.of("", b"ab")
    system.reasoner.table["ab"] = ecr("think of", "aab")
    refuse = InvalidInputError("too odd", field="inputs[1].content", reason="UNREADABLE")

    def odd(item):
        return refuse if item.query and item.content.media[0].data == b"bbbb" else None

    system.reasoner.refuse = odd
    *_, last = system.search(content=query, budget=Budget(rewrite_depth=5))
    rewritten = {c.id for c in last.results if c.rewrite is not None}
    # The one that is refused is the fourth: the second of the second message.
    assert rewritten == set(BY_COSINE) - {"bbbb"}
    assert ("rewrite", "UNREADABLE") in degraded(last)
    parts = [u for u in last.usage if u.stage == "rewrite"]
    assert len(parts) == 4, "one message, the refused one, and both again without it"


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
