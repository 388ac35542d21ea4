"""Search and ingest over a reasoner that embeds as well; fake stages, virtual clock."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cascade.fakes import (
    FakeEmbedder,
    FakeReranker,
    RememberingIndex,
    UnifiedReasoner,
    collect,
    ecr,
    letters,
    run,
)
from tte_jax.cascade import Cascade, IngestOptions, ItemState, SearchQuery
from tte_jax.content import NO_REASONING, Budget, Content, Document
from tte_jax.errors import PreconditionError, UnavailableError

ALONE = Budget(rerank_depth=0)


class Corpus(RememberingIndex):
    """Knows whose vectors it holds, and refuses others."""

    def __init__(self, version: str) -> None:
        super().__init__()
        self.version = version
        self.searched: list[np.ndarray] = []

    async def search(self, vector, *, embedder_version="", **kwargs):
        if embedder_version != self.version:
            raise PreconditionError(
                "other vectors", reason="EMBEDDER_MISMATCH", expected=self.version
            )
        self.searched.append(vector)
        return await super().search(vector, embedder_version=embedder_version, **kwargs)


class System:
    """One model for both; the corpus has its vectors of `aab ab bbbb`."""

    def __init__(self, **cascade) -> None:
        self.reasoner = UnifiedReasoner({"ask": ecr("think of", "aab"), "more": ecr("so", "bbbb")})
        self.embedder = FakeEmbedder()
        self.embedder.version = "unified-1"
        self.index = Corpus("unified-1")
        for id in ("aab", "ab", "bbbb"):
            self.index.put(id, ecr(f"seen {id}", id))
        self.cascade = Cascade(self.reasoner, self.embedder, self.index, FakeReranker(), **cascade)

    def search(self, text: str = "ask", budget: Budget = ALONE, **query):
        query = SearchQuery(Content.of(text), budget=budget, **query)
        (only,) = run(collect(self.cascade.search(query)))
        return only

    def ingest(self, *texts: str, **options):
        async def stream():
            for text in texts:
                yield Document(text, Content.of(f"text {text}"))

        return run(collect(self.cascade.ingest(stream(), IngestOptions(**options))))


def ids(update):
    return [candidate.id for candidate in update.results]


def spent(update):
    return [(u.stage, u.within) for u in update.usage]


def test_the_embedder_is_left_out_once_both_are_known_to_be_one_model():
    system = System()
    first = system.search()  # whose versions nobody knows yet
    assert spent(first) == [("reason", ""), ("embed", ""), ("index", "")]
    assert system.reasoner.asked_to_embed == []
    second = system.search()
    assert spent(second) == [("reason", ""), ("embed", "reason"), ("index", "")]
    assert system.embedder.calls == 1
    assert ids(second) == ids(first) == ["aab", "ab", "bbbb"]
    np.testing.assert_array_equal(system.index.searched[0], system.index.searched[1])
    assert second.query_reasoning == first.query_reasoning
    assert not second.degraded


def test_what_was_spent_is_told_as_it_was():
    system = System()
    system.search()
    system.reasoner.delay = 2.0
    reason, embed, _ = system.search().usage
    assert (reason.wall_s, reason.tokens_in, reason.tokens_out) == (pytest.approx(2.0), 7, 4)
    assert (embed.wall_s, embed.compute_s) == (0.0, 0.125)
    assert (embed.tokens_in, embed.cached_tokens, embed.model_version) == (6, 5, "unified-1")
    # The time to embed in case the reasoner dies is still that of the embedder.
    assert system.cascade.pace.unit_s["embed"] == pytest.approx(0.0)


def test_without_reasoning_the_embedder_embeds():
    system = System()
    system.search()
    assert spent(system.search("bbbb", Budget(reasoning_tokens=0, rerank_depth=0))) == [
        ("embed", ""), ("index", ""),
    ]  # fmt: skip
    assert system.reasoner.asked_to_embed == []


def test_a_query_that_the_reasoner_cannot_embed_goes_to_the_embedder():
    system = System()
    system.search()
    system.reasoner.unable = {"ask"}
    assert spent(system.search()) == [("reason", ""), ("embed", ""), ("index", "")]
    assert spent(system.search("more"))[1] == ("embed", "reason")


def test_a_vector_that_is_no_number_is_not_searched_for():
    system = System()
    system.search()
    made = system.reasoner.reason_and_embed

    async def broken(items, **kwargs):
        answers, embeddings, usage = await made(items, **kwargs)
        embeddings[0].vector[:] = np.nan
        return answers, embeddings, usage

    system.reasoner.reason_and_embed = broken
    update = system.search()
    assert spent(update)[1] == ("embed", "") and ids(update)[0] == "aab"


def test_two_models_are_never_asked_to_be_one():
    system = System()
    system.embedder.version = system.index.version = "embedder-1"
    for _ in range(2):
        assert spent(system.search()) == [("reason", ""), ("embed", ""), ("index", "")]
    assert system.reasoner.asked_to_embed == []


def test_a_vector_of_another_version_is_not_taken():
    """A replica with other weights answered."""
    system = System()
    system.search()
    system.reasoner.embeds_as = "unified-2"
    assert spent(system.search()) == [("reason", ""), ("embed", ""), ("index", "")]
    assert system.embedder.calls == 2


def test_a_reasoner_that_dies_costs_the_reasoning_and_no_more():
    system = System()
    system.search()
    system.reasoner.broken = UnavailableError("away")
    update = system.search("aab")
    assert [(d.stage, d.reason) for d in update.degraded] == [("reason", "UNAVAILABLE")]
    assert spent(update) == [("reason", ""), ("embed", ""), ("index", "")]
    assert ids(update)[0] == "aab" and update.query_reasoning == NO_REASONING
    assert system.embedder.items[-1].reasoning == ""


def test_a_corpus_with_other_vectors_gets_the_embedders():
    """The embedder was replaced, and the corpus is its successor's; the reasoner is the old one."""
    system = System()
    system.search()
    system.embedder.version = system.index.version = "embedder-2"
    update = system.search()
    assert ids(update)[0] == "aab"
    assert spent(update) == [
        ("reason", ""), ("embed", "reason"), ("index", ""), ("embed", ""), ("index", ""),
    ]  # fmt: skip
    # From now on it is known.
    assert spent(system.search()) == [("reason", ""), ("embed", ""), ("index", "")]


def test_a_change_over_is_followed_at_once():
    following = FakeEmbedder()
    following.version = "embedder-2"
    system = System(next_embedder=following)
    system.search()
    system.index.version = "embedder-2"
    assert ids(system.search())[0] == "aab"
    assert (system.embedder.calls, following.calls) == (1, 1)
    assert spent(system.search())[1] == ("embed", "")


def test_other_refusals_of_the_index_are_the_searchs():
    system = System()
    system.search()
    system.index.errors = [PreconditionError("no", reason="RECOVERING")]
    with pytest.raises(PreconditionError, match="no"):
        system.search()


def test_an_ingest_takes_the_vectors_of_the_reasoner():
    system = System()
    system.search()
    system.reasoner.unable = {"text b"}
    updates = system.ingest("a", "b", "c", "d")
    results = {r.id: r.state for update in updates for r in update.results}
    assert results == dict.fromkeys("abcd", ItemState.STORED)
    # One question for its version, and the one that the reasoner could not embed.
    embedded = [item.content.text for item in system.embedder.items[1:]]
    assert embedded == ["version", "text b"]
    assert system.index.batches == [["a", "b", "c", "d"]]
    for id in "abcd":
        entry = system.index.entries[id]
        assert entry.embedder_version == "unified-1"
        if id != "b":
            np.testing.assert_array_equal(entry.vector, letters("plain"))
    usage = {(u.stage, u.within): u for u in updates[-1].usage}
    assert usage["embed", "reason"].tokens_in == 3 * 6
    assert usage["embed", "reason"].cached_tokens == 3 * 5
    assert usage["embed", "reason"].wall_s == 0.0
    assert usage["embed", ""].tokens_in == 2 * 5


def test_an_ingest_finds_out_by_itself():
    """Its first batch is embedded by the embedder; from the moment that answers, no other is."""
    system = System()
    names = [f"d{n}" for n in range(12)]
    updates = system.ingest(*names, batch_documents=2)
    assert updates[-1].stored == 12
    taken = len(system.reasoner.asked_to_embed)
    assert 4 <= taken <= 10
    questions = [item.content.text for item in system.embedder.items].count("version")
    assert len(system.embedder.items) == 12 - taken + questions and questions == 1
    assert {system.index.entries[name].embedder_version for name in names} == {"unified-1"}


def test_an_ingest_asks_whose_vectors_are_wanted_now():
    """An empty corpus would take any: the embedder was replaced since the last search."""
    system = System()
    system.search()
    system.embedder.version = "embedder-2"
    system.index.entries.clear()
    system.ingest("a")
    assert system.reasoner.asked_to_embed == []
    assert system.index.entries["a"].embedder_version == "embedder-2"


def test_an_ingest_without_reasoning_goes_to_the_embedder():
    system = System()
    system.search()
    system.ingest("a")
    before = len(system.embedder.items)
    system.ingest("b", reasoning_tokens=0)
    assert len(system.reasoner.asked_to_embed) == 1
    texts = [item.content.text for item in system.embedder.items[before:]]
    assert "text b" in texts
