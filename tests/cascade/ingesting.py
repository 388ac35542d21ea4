"""A cascade over fake stages that takes documents in, on a virtual clock."""

from tests.cascade.fakes import (
    FakeEmbedder,
    FakeReasoner,
    FakeReranker,
    ResumableIndex,
    collect,
    run,
)
from tte_jax.cascade import Cascade, IngestOptions, ItemState
from tte_jax.content import Content, Document

STORED, SKIPPED, FAILED = ItemState.STORED, ItemState.SKIPPED, ItemState.FAILED


class System:
    def __init__(self, index=None) -> None:
        self.reasoner, self.embedder = FakeReasoner(), FakeEmbedder()
        self.index = index or ResumableIndex()
        self.cascade = Cascade(self.reasoner, self.embedder, self.index, FakeReranker())

    def ingest(self, documents, **options):
        return run(collect(self.cascade.ingest(stream(documents), IngestOptions(**options))))


async def stream(items):
    for item in items:
        yield item


def docs(*texts, **metadata):
    return [Document(text, Content.of(f"text {text}"), metadata) for text in texts]


def outcome(updates):
    """position → (id, state), each position exactly once."""
    results = [result for update in updates for result in update.results]
    assert len({r.position for r in results}) == len(results)
    return {r.position: (r.id, r.state) for r in sorted(results, key=lambda r: r.position)}


def errors(updates):
    return {r.id: r.error for u in updates for r in u.results if r.error}
