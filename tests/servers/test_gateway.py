"""The gateway as its users meet it: a real server over real stage services with exact answers."""

import asyncio
import contextlib
from dataclasses import replace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servers import gateway
from servers.gateway import BackendWatch, CurrentEmbedder
from tests.cascade.fakes import ecr, run
from tests.servers.fake_services import listening, stages
from tests.servers.gateway_over_fakes import (
    BY_COSINE,
    STORED,
    collect,
    corpus,
    docs,
    gateway_at,
    gateway_over,
    ids,
    outcome,
    until,
)
from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax.cascade import (
    Cascade,
    Include,
    SearchQuery,
    SearchStage,
)
from tte_jax.client import AsyncClient, Client
from tte_jax.content import NO_REASONING, Budget, Content
from tte_jax.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from tte_jax.filters import Range

# --- search ---


async def test_a_search_streams_the_first_stage_then_the_reranked_list():
    fakes = corpus()
    fakes.reranker.table = {
        f"seen {id}. Answer: {id}": p for id, p in [("aab", 0.25), ("ab", 0.75)]
    }
    query = SearchQuery(Content.of("ask", b"png"), budget=Budget(rerank_depth=2), deadline_s=20)
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        first, last = await collect(client.search(query))
    assert (first.stage, first.final, ids(first)) == (SearchStage.FIRST_STAGE, False, BY_COSINE)
    assert (last.stage, last.final, last.degraded) == (SearchStage.RERANKED, True, ())
    assert ids(last) == ["ab", "aab", "abb", "bbbb", "cc"]
    assert [c.rerank for c in last.results] == [0.75, 0.25, None, None, None]
    assert last.results[0].cosine == pytest.approx(3 / np.sqrt(10))
    assert last.results[0].reasoning == ecr("seen ab", "ab")
    assert last.results[0].metadata == {"n": 2}
    assert last.query_reasoning == ecr("think of", "aab")
    assert [u.stage for u in last.usage] == ["reason", "embed", "index", "rerank"]
    reason = last.usage[0]
    assert (reason.tokens_in, reason.tokens_out, reason.queue_s) == (7, 4, 0.25)
    assert all(u.wall_s > 0 for u in last.usage)
    assert fakes.embedder.items[0].content == Content.of("ask", b"png")
    # What is left of the caller's deadline reaches the stages.
    assert all(t is not None and 0 < t < 20 for t in fakes.embedder.timeouts)


async def test_rewrites_filters_top_k_and_includes_travel_through():
    fakes = corpus()
    query = SearchQuery(
        Content.of("ask"),
        top_k=2,
        filter=Range("n", at_least=3),
        budget=Budget(rewrite_depth=1, rerank_depth=1),
        include=Include(scores=False, reasoning=False, timings=False),
    )
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        updates = await collect(client.search(query))
        full = await client.search_final(replace(query, include=Include()))
    assert [u.stage for u in updates] == [
        SearchStage.FIRST_STAGE, SearchStage.REWRITTEN, SearchStage.RERANKED,
    ]  # fmt: skip
    assert ids(updates[-1]) == ["aab", "abb"]
    assert np.isnan(updates[-1].results[0].cosine)
    assert updates[-1].results[0].rerank is None
    assert (updates[-1].usage, updates[-1].query_reasoning) == ((), NO_REASONING)
    assert full.results[0].rewrite == ecr("aab|ask", "plain")
    assert full.results[0].rerank is not None


async def test_a_sick_stage_degrades_the_search_and_says_so():
    fakes = corpus()
    fakes.reranker.broken = UnavailableError("down")
    fakes.reasoner.broken = OverloadedError("full")
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        last = await client.search_final(SearchQuery(Content.of("aab"), deadline_s=20))
    assert ids(last) == BY_COSINE
    assert [(d.stage, d.reason) for d in last.degraded] == [
        ("reason", "OVERLOADED"), ("rerank", "UNAVAILABLE"),
    ]  # fmt: skip
    assert last.final


async def test_a_slow_stage_costs_no_results_before_the_deadline():
    fakes = corpus()
    fakes.reranker.delay = 600
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        updates = await collect(client.search(SearchQuery(Content.of("ask"), deadline_s=3)))
    assert [u.final for u in updates] == [False, True]
    assert ids(updates[-1]) == BY_COSINE
    assert [(d.stage, d.reason) for d in updates[-1].degraded] == [("rerank", "DEADLINE_EXCEEDED")]
    assert fakes.reranker.cancelled == 1


@pytest.mark.parametrize("stage", ["embedder", "index"])
async def test_without_embedder_or_index_the_search_fails_with_their_error(stage):
    fakes = corpus()
    getattr(fakes, stage).broken = UnavailableError("warming up", retry_after_s=1.5)
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        with pytest.raises(UnavailableError, match="warming up") as caught:
            await client.search_final(SearchQuery(Content.of("ask"), deadline_s=20))
    assert caught.value.retry_after_s == 1.5


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (SearchQuery(Content(())), "query"),
        (SearchQuery(Content.of("", b"")), "query.parts[0].image.data"),
        (SearchQuery(Content.of("x"), top_k=0), "top_k"),
        (SearchQuery(Content.of("x"), top_k=1001), "top_k"),
        (SearchQuery(Content.of("x"), budget=Budget(rewrite_depth=1000)), "budget.rewrite_depth"),
    ],
)
async def test_wrong_queries_name_the_field(query, field):
    async with gateway_over(corpus()) as address, AsyncClient(address) as client:
        with pytest.raises(InvalidInputError) as caught:
            await client.search_final(query)
    assert caught.value.field == field


async def test_an_unreadable_image_is_the_querys_field():
    fakes = corpus()
    fakes.reasoner.broken = InvalidInputError(
        "not an image", field="inputs[0].content.parts[0].image.data", reason="UNREADABLE_IMAGE"
    )
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        with pytest.raises(InvalidInputError) as caught:
            await client.search_final(SearchQuery(Content.of("x", b"junk")))
    assert caught.value.field == "query.parts[0].image.data"
    assert caught.value.reason == "UNREADABLE_IMAGE"


@pytest.mark.parametrize("stage", ["reasoner", "embedder", "index", "reranker"])
async def test_a_user_who_leaves_frees_the_stage(stage):
    fakes = corpus()
    behaviour = getattr(fakes, stage)
    behaviour.delay = 600
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        task = asyncio.create_task(collect(client.search(SearchQuery(Content.of("ask")))))
        await until(lambda: behaviour.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: behaviour.cancelled == 1)


async def test_defaults_of_a_bare_request():
    fakes = corpus()
    query = retrieval_pb2.SearchRequest()
    query.query.parts.add(text="ask")
    async with gateway_over(fakes) as address, grpc.aio.insecure_channel(address) as channel:
        stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)
        responses = await collect(stub.Search(query))
        document = retrieval_pb2.IngestRequest()
        document.document.id = "bare"
        document.document.content.parts.add(text="bare")
        ingested = await collect(stub.Ingest(iter([document])))
    assert [r.final for r in responses] == [False, True]
    assert len(responses[-1].candidates[0].reasoning.text) > 0
    assert responses[-1].candidates[0].HasField("rerank")
    assert fakes.reasoner.max_tokens[0] == 64
    assert ingested[-1].progress.stored == 1


async def test_the_blocking_client_does_the_same():
    fakes = corpus()
    async with gateway_over(fakes) as address:

        def blocking():
            with Client(address) as client:
                query = SearchQuery(Content.of("ask"), deadline_s=20)
                stages_seen = [u.stage for u in client.search(query)]
                final = client.search_final(query)
                updates = list(client.ingest(docs("x", "y")))
                document = client.get_document("x")
                deleted = client.delete_documents(["x"])
                with pytest.raises(NotFoundError):
                    client.get_document("x")
                with pytest.raises(InvalidInputError):
                    client.search_final(SearchQuery(Content(())))
                for update in client.search(query):
                    assert not update.final
                    break  # leaves the search
            return stages_seen, final, updates, document, deleted

        stages_seen, final, updates, document, deleted = await asyncio.to_thread(blocking)
    assert stages_seen == [SearchStage.FIRST_STAGE, SearchStage.RERANKED]
    assert ids(final) and final.final
    assert outcome(updates) == {0: ("x", STORED), 1: ("y", STORED)}
    assert document.content == Content.of("text x")
    assert deleted == (["x"], [])


# --- a gateway that breaks off ---


async def test_rankings_that_came_before_the_gateway_died_are_kept():
    class Dies(retrieval_pb2_grpc.RetrievalServiceServicer):
        async def Search(self, request, context):
            yield retrieval_pb2.SearchResponse(
                stage=retrieval_pb2.SEARCH_STAGE_FIRST_STAGE,
                candidates=[retrieval_pb2.Candidate(id="a", cosine=0.5)],
            )
            raise DeadlineExceededError("the deadline passed")

    add = retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server
    async with listening(lambda server: add(Dies(), server)) as port:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            first, last = await collect(client.search(SearchQuery(Content.of("x"))))

        def blocking():
            with Client(f"127.0.0.1:{port}") as client:
                return list(client.search(SearchQuery(Content.of("x"))))

        assert await asyncio.to_thread(blocking) == [first, last]
    assert (first.final, last.final) == (False, True)
    assert last.results == first.results
    assert [(d.stage, d.reason) for d in last.degraded] == [("gateway", "DEADLINE_EXCEEDED")]


# --- health ---


class Switch:
    def __init__(self) -> None:
        self.on = True

    async def serving(self, *, timeout_s: float = 1.0) -> bool:
        return self.on

    async def disconnected(self) -> None:
        await asyncio.Event().wait()


def test_health_follows_embedder_and_index_only():
    backends = {name: Switch() for name in ("reasoner", "embedder", "index", "reranker")}
    watch = BackendWatch(backends, poll_s=2.0)
    said = []

    async def set_serving(serving):
        said.append((asyncio.get_running_loop().time(), serving))

    async def main():
        loop = asyncio.get_running_loop()
        backends["index"].on = False
        warm = asyncio.create_task(watch.until_ready())
        await asyncio.sleep(5)
        assert not warm.done()
        backends["index"].on = True
        await warm
        began = loop.time()
        running = asyncio.create_task(watch.run(set_serving))
        await asyncio.sleep(0.5)
        for name, on in [
            ("reasoner", False), ("embedder", False), ("reranker", False),
            ("embedder", True), ("index", False), ("index", True),
        ]:  # fmt: skip
            backends[name].on = on
            await asyncio.sleep(3)
        running.cancel()
        return [(round(time - began), serving) for time, serving in said]

    assert run(main()) == [(4, False), (10, True), (14, False), (16, True)]
    gauges = {name: gauge() for name, gauge in watch.gauges().items()}
    assert gauges == {"reasoner_up": 0, "embedder_up": 1, "index_up": 1, "reranker_up": 0}


def test_health_follows_the_embedder_that_the_corpus_has_changed_over_to():
    old, following = Switch(), Switch()
    nobody: Any = None
    cascade = Cascade(nobody, cast(Any, old), nobody, nobody, next_embedder=cast(Any, following))
    watch = BackendWatch({"embedder": CurrentEmbedder(cascade), "index": Switch()}, poll_s=2.0)
    said = []

    async def set_serving(serving):
        said.append(serving)

    async def main():
        await watch.until_ready()
        running = asyncio.create_task(watch.run(set_serving))
        changed = PreconditionError("other vectors", reason="EMBEDDER_MISMATCH", expected="new")
        assert cascade.change_over(changed)
        old.on = False  # it may be stopped now
        await asyncio.sleep(10)
        assert said == []
        following.on = False
        await asyncio.sleep(10)
        assert said == [False]
        running.cancel()

    run(main())


def test_a_stage_that_answers_slowly_is_not_down():
    class Slow(Switch):
        seconds = 0.0

        async def serving(self, *, timeout_s=1.0):
            await asyncio.sleep(min(self.seconds, timeout_s))
            return self.seconds < timeout_s

    slow = Slow()
    watch = BackendWatch({"embedder": Switch(), "index": slow}, poll_s=2.0)
    said = []

    async def set_serving(serving):
        said.append(serving)

    async def main():
        await watch.until_ready()
        running = asyncio.create_task(watch.run(set_serving))
        slow.seconds = 3.0
        await asyncio.sleep(20)
        assert said == []
        slow.seconds = 3600.0  # hangs
        await asyncio.sleep(20)
        assert said == [False]
        slow.seconds = 0.0
        await asyncio.sleep(4)
        assert said == [False, True]
        running.cancel()

    run(main())


async def test_the_gateway_serves_when_its_stages_do_and_not_after(monkeypatch):
    monkeypatch.setattr(gateway, "POLL_S", 3600.0)  # a broken connection is noticed without it
    fakes = corpus()
    async with contextlib.AsyncExitStack() as stack:
        backends = await stack.enter_async_context(contextlib.AsyncExitStack())
        address = await backends.enter_async_context(stages(fakes))
        served = await stack.enter_async_context(gateway_at(address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(served))
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=gateway.NAME)
        seen = []

        async def watch():
            async for answer in stub.Watch(request):
                seen.append(answer.status)

        watching = asyncio.create_task(watch())
        serving = health_pb2.HealthCheckResponse.SERVING
        await until(lambda: seen == [serving])
        await backends.aclose()
        await until(lambda: seen[-1] == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert seen == [serving, health_pb2.HealthCheckResponse.NOT_SERVING]
        watching.cancel()
