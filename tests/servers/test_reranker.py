"""How the reranker's RPCs queue: mining gives way to searches."""

from __future__ import annotations

from types import SimpleNamespace

from servers.reranker import RerankerServicer
from tests import tiny_models
from tte.v1 import reranker_pb2

NO_DEADLINE = SimpleNamespace(time_remaining=lambda: None)


async def test_mining_waits_behind_searches(monkeypatch):
    role = tiny_models.reranker()
    put, seen = role.queue.put, []

    def watching(entries, **kwargs):
        seen.append({entry.background for entry in entries})
        put(entries, **kwargs)

    monkeypatch.setattr(role.queue, "put", watching)
    servicer = RerankerServicer(role)
    text = reranker_pb2.MiningText(id="1", text="a cat")
    query = reranker_pb2.MineNegativesRequest(
        query_id="q", query="a cat", positive=text, candidates=[text]
    )

    async def queries():
        yield query

    answers = [one async for one in servicer.MineNegatives(queries(), NO_DEADLINE)]
    assert [one.query_id for one in answers] == ["q"]
    await servicer.Rerank(
        reranker_pb2.RerankRequest(query="a cat", candidates=["a dog"]), NO_DEADLINE
    )
    assert seen == [{True}, {False}]
