"""Changing a corpus's embedder: the job, and the cascade that follows it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cascade.fakes import FakeEmbedder, FakeReasoner, FakeReranker, collect
from tte_jax.cascade import Cascade, IngestOptions, SearchQuery, reembed
from tte_jax.content import Content, Document
from tte_jax.errors import PreconditionError, UnavailableError
from tte_jax.index import CorpusIndex, LocalIndex


class Mirrored(FakeEmbedder):
    """Another space of the same dimension: the letters count from the end of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "embedder-2"

    async def embed(self, items, *, dimension=0, timeout_s=None):
        vectors, usage = await super().embed(items, dimension=dimension, timeout_s=timeout_s)
        return np.ascontiguousarray(vectors[:, ::-1]), usage


async def documents(*texts: str):
    for text in texts:
        yield Document(text, Content.of(text))


@pytest.fixture
async def system(tmp_path):
    index = LocalIndex(CorpusIndex.open(tmp_path))
    cascade = Cascade(
        FakeReasoner(), FakeEmbedder(), index, FakeReranker(), next_embedder=Mirrored()
    )
    await collect(cascade.ingest(documents("aab", "ab", "bb", "cc", "zz")))
    yield cascade
    await index.close()


async def found(cascade: Cascade, text: str) -> list[str]:
    (*_, last) = await collect(cascade.search(SearchQuery(Content.of(text))))
    return [candidate.id for candidate in last.results]


async def test_the_cascade_follows_when_the_corpus_changes_over_and_back(system):
    before = await found(system, "aab")
    reasoned = system.reasoner.calls
    updates = await collect(reembed(system.index, Mirrored(), batch=2))
    assert [u.staged for u in updates] == [0, 2, 4, 5, 5]
    assert updates[-1].promoted is not None
    assert system.reasoner.calls == reasoned  # ECRs are kept
    assert system.index.index.stats().embedder_version == "embedder-2"
    assert await found(system, "aab") == before
    assert isinstance(system.embedder, Mirrored)
    await collect(system.ingest(documents("new")))
    assert await found(system, "new") != []
    await collect(reembed(system.index, FakeEmbedder(), batch=64))
    assert (await found(system, "aab"))[0] == before[0]
    assert not isinstance(system.embedder, Mirrored)
    assert system.index.index.verify() == []


async def test_an_ingest_with_the_old_embedder_ends_and_goes_on_with_the_new(system):
    await collect(reembed(system.index, Mirrored()))
    with pytest.raises(PreconditionError):
        await collect(system.ingest(documents("late"), IngestOptions(skip_stored=False)))
    updates = await collect(system.ingest(documents("late")))
    assert updates[-1].stored == 1


async def test_without_a_next_embedder_the_search_says_what_is_wrong(system):
    system.next_embedder = None
    await collect(reembed(system.index, Mirrored()))
    with pytest.raises(PreconditionError, match="embedder-1.*embedder-2") as caught:
        await found(system, "aab")
    assert caught.value.reason == "EMBEDDER_MISMATCH"


async def test_a_job_that_died_goes_on_where_it_was(system):
    embedder = Mirrored()
    embedder.refuse = lambda item: UnavailableError("gone") if "zz" in item.reasoning else None
    updates = []
    with pytest.raises(UnavailableError):
        async for update in reembed(system.index, embedder, batch=2):
            updates.append(update)
    assert updates[-1].staged == 4
    embedder.refuse = lambda item: None
    embedder.items.clear()
    again = await collect(reembed(system.index, embedder, batch=2, promote=False))
    assert (again[0].staged, again[-1].pending, again[-1].promoted) == (4, 0, None)
    assert len(embedder.items) == 2  # the probe, and the one that was missing
    assert (await found(system, "aab"))[0] == "aab"  # the old vectors serve
    assert (await collect(reembed(system.index, embedder)))[-1].promoted is not None


async def test_documents_written_meanwhile_are_embedded_before_the_change(system):
    embedder, written = Mirrored(), []

    async def write_once():
        if not written:
            written.append(1)
            await collect(system.ingest(documents("abc")))

    embed = embedder.embed

    async def embed_and_write(items, **kwargs):
        if len(items) < 2:
            return await embed(items, **kwargs)
        answer = await embed(items, **kwargs)
        await write_once()
        return answer

    embedder.embed = embed_and_write
    last = (await collect(reembed(system.index, embedder, batch=5)))[-1]
    assert last.promoted.documents == 6
    assert "abc" in await found(system, "abc")
    assert system.index.index.verify() == []
