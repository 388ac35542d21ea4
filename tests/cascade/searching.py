"""A cascade over fake stages, searched on a virtual clock."""

from tests.cascade.fakes import (
    FakeEmbedder,
    FakeIndex,
    FakeReasoner,
    FakeReranker,
    collect,
    ecr,
    run,
)
from tte_jax.cascade import Caps, Cascade, SearchQuery, SearchStage
from tte_jax.content import Content

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
