"""One model directory behind reasoner and embedder: searches and ingests embed in its slots."""

from __future__ import annotations

import asyncio

import pytest

from tests.system import running
from tests.system.running import System, query
from tte_jax.cascade import IngestOptions, SearchQuery
from tte_jax.client import Client, RemoteEmbedder, RemoteIndex
from tte_jax.content import Budget, Content, Side
from tte_jax.stages import EmbedItem


def embedded(usage) -> list[str]:
    """Within which stages embeddings were made; "" = by the embedder."""
    return [u.within for u in usage if u.stage == "embed"]


@pytest.fixture
def informed(client: Client) -> Client:
    """A client of a gateway that knows which models answer."""
    client.search_final(query("a cat"))
    return client


def test_a_search_ranks_by_the_embedders_vector(system: System, informed: Client) -> None:
    asked = query("a red dog")
    found = informed.search_final(asked)
    assert embedded(found.usage) == ["reason"] and not found.degraded
    item = EmbedItem(asked.content, Side.QUERY, found.query_reasoning.text)

    async def again() -> dict[str, float]:
        embedder = RemoteEmbedder(system.addresses["embedder"])
        index = RemoteIndex(system.addresses["index"])
        vectors, usage = await embedder.embed([item])
        hits, _ = await index.search(vectors[0], k=20, embedder_version=usage.model_version)
        await asyncio.gather(embedder.close(), index.close())
        return {hit.id: hit.cosine for hit in hits}

    expected = asyncio.run(again())
    assert found.results and {c.id: c.cosine for c in found.results} == pytest.approx(
        {c.id: expected[c.id] for c in found.results}, abs=1e-5
    )


def test_without_reasoning_the_embedder_answers(informed: Client) -> None:
    asked = SearchQuery(Content.of("a red dog"), budget=Budget(reasoning_tokens=0))
    assert embedded(informed.search_final(asked).usage) == [""]


def test_documents_are_embedded_in_the_slots_too(system: System, informed: Client) -> None:
    before = system.metrics("reasoner")["tte_slots_embedded"]
    given = running.documents(9, prefix="unified")
    options = IngestOptions(reasoning_tokens=running.BUDGET.reasoning_tokens)
    last = list(informed.ingest(given, options, timeout_s=200.0))[-1]
    assert last.stored == len(given)
    assert "reason" in embedded(last.usage)
    assert system.metrics("reasoner")["tte_slots_embedded"] > before
    informed.delete_documents([document.id for document in given])
