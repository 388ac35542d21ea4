"""The gateway as its users meet it: a real server over real stage services with exact answers."""

import asyncio
import contextlib
from dataclasses import replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servers import gateway, index, runtime
from servers.gateway import BackendWatch
from servers.settings import Settings
from tests.cascade.fakes import ecr, run
from tests.servers.fake_services import Fakes, listening, stages
from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax.cascade import (
    Include,
    IngestOptions,
    ItemState,
    SearchQuery,
    SearchStage,
)
from tte_jax.client import AsyncClient, Client
from tte_jax.content import NO_REASONING, Budget, Content, Document
from tte_jax.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from tte_jax.filters import Range

STORED, SKIPPED, FAILED = ItemState.STORED, ItemState.SKIPPED, ItemState.FAILED
STAGES = ("reasoner", "embedder", "index", "reranker")
# By cosine with the ECR's answer `aab`: aab 1, ab .949, abb .8, bbbb .447, cc 0.
BY_COSINE = ["aab", "ab", "abb", "bbbb", "cc"]


@contextlib.asynccontextmanager
async def gateway_over(fakes: Fakes, **settings):
    """The gateway in the servers' runtime over fake stage services. Yields its address."""
    async with stages(fakes) as address:
        async with gateway_at(address, **settings) as served:
            yield served


@contextlib.asynccontextmanager
async def gateway_at(address, **settings):
    stop = asyncio.Event()
    port = asyncio.get_running_loop().create_future()
    addresses = {f"{name}_address": address for name in STAGES}
    values = {"service": "gateway", "port": 0, **addresses, **settings}
    task = asyncio.create_task(
        runtime.serve(Settings(**values), gateway.create, stop=stop, ready=port.set_result)
    )
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield f"127.0.0.1:{port.result()}"
    finally:
        stop.set()
        await task


def corpus() -> Fakes:
    fakes = Fakes()
    fakes.reasoner.table["ask"] = ecr("think of", "aab")
    for id in BY_COSINE:
        fakes.index.put(id, ecr(f"seen {id}", id))
    return fakes


async def collect(updates):
    return [update async for update in updates]


def ids(update):
    return [candidate.id for candidate in update.results]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


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


# --- ingest, get, delete ---


def docs(*names, **metadata):
    return [Document(name, Content.of(f"text {name}"), metadata) for name in names]


async def stream(items):
    for item in items:
        yield item


def outcome(updates):
    return {r.position: (r.id, r.state) for update in updates for r in update.results}


async def test_ingest_get_search_and_delete():
    fakes = Fakes()
    document = Document("cat", Content.of("a cat", b"png"), {"color": "red"})
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        updates = await collect(client.ingest(stream([document, *docs("dog")])))
        assert outcome(updates) == {0: ("cat", STORED), 1: ("dog", STORED)}
        last = updates[-1]
        assert (last.final, last.received, last.stored, last.sequence) == (True, 2, 2, 2)
        assert {u.stage for u in last.usage} >= {"reason", "embed", "index"}
        found = await client.get_document("cat")
        assert (found.content, found.metadata) == (document.content, document.metadata)
        assert found.reasoning.answer == "plain"
        bare = await client.get_document("cat", omit_media=True)
        assert bare.content == Content.of("a cat")
        query = SearchQuery(Content.of("cat"))
        assert set(ids(await client.search_final(query))) == {"cat", "dog"}
        assert await client.delete_documents(["cat", "no"]) == (["cat"], ["no"])
        with pytest.raises(NotFoundError, match="'cat'"):
            await client.get_document("cat")
        with pytest.raises(InvalidInputError):
            await client.get_document("")
        with pytest.raises(InvalidInputError):
            await client.delete_documents([])


async def test_sending_everything_again_resumes_over_grpc():
    fakes = Fakes()
    options = IngestOptions(reasoning_tokens=9, instruction="emoji")
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        await collect(client.ingest(stream(docs("a", "b", n=1)), options))
        assert fakes.reasoner.max_tokens == [9]
        again = await collect(client.ingest(stream(docs("a", "b", "c", n=1)), options))
        changed = await collect(client.ingest(stream(docs("a", n=2)), options))
        forced = replace(options, skip_stored=False)
        redone = await collect(client.ingest(stream(docs("b", n=1)), forced))
    assert outcome(again) == {0: ("a", SKIPPED), 1: ("b", SKIPPED), 2: ("c", STORED)}
    assert (again[-1].skipped, again[-1].stored) == (2, 1)
    assert outcome(changed) == {0: ("a", STORED)}
    assert fakes.index.entries["a"].document.metadata == {"n": 2}
    assert outcome(redone) == {0: ("b", STORED)}


async def test_the_real_index_stores_resumes_and_finds(tmp_path):
    fakes = Fakes()
    document = Document("cat", Content.of("cat", b"png"), {"color": "red", "n": 1, "real": True})

    async def session(work):
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        settings = Settings(service="index", port=0, data_dir=tmp_path)
        task = asyncio.create_task(
            runtime.serve(settings, index.create, stop=stop, ready=port.set_result)
        )
        try:
            address = f"127.0.0.1:{await asyncio.wait_for(port, 30)}"
            async with gateway_over(fakes, index_address=address) as served:
                async with AsyncClient(served) as client:
                    return await work(client)
        finally:
            stop.set()
            await task

    async def store(client):
        return await collect(client.ingest(stream([document, *docs("dog")])))

    async def change_and_search(client):
        again = await collect(client.ingest(stream([document, *docs("dog", n=2)])))
        query = SearchQuery(Content.of("cat"), filter=Range("n", below=2), deadline_s=20)
        return again, await client.search_final(query), await client.get_document("cat")

    first = await session(store)
    assert outcome(first) == {0: ("cat", STORED), 1: ("dog", STORED)}
    again, found, stored = await session(change_and_search)
    assert outcome(again) == {0: ("cat", SKIPPED), 1: ("dog", STORED)}
    assert ids(found) == ["cat"]
    assert found.degraded == ()
    assert found.results[0].rerank == 1.0  # the query's words are the document's
    assert (stored.content, stored.metadata) == (document.content, document.metadata)


async def test_a_bad_document_fails_alone_with_its_field():
    fakes = Fakes()

    def refuse(item):
        if item.content.media and item.content.media[0].data == b"junk":
            return InvalidInputError(
                "not an image", field="inputs[1].content.parts[0].image.data", reason="UNREADABLE"
            )

    fakes.reasoner.refuse = refuse
    documents = [
        *docs("a"),
        Document("zero", Content.of("text", b"")),
        Document("junk", Content.of("text", b"junk")),
        Document("x" * 300, Content.of("text")),
        *docs("b"),
    ]
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        updates = await collect(client.ingest(stream(documents)))
    states = [state for _, (_, state) in sorted(outcome(updates).items())]
    assert states == [STORED, FAILED, FAILED, FAILED, STORED]
    errors = {r.position: r.error for u in updates for r in u.results if r.error}
    assert {type(error) for error in errors.values()} == {InvalidInputError}
    assert errors[1].field == errors[2].field == "document.content.parts[0].image.data"
    assert errors[2].reason == "UNREADABLE"
    assert errors[3].field == "document.id"
    assert (updates[-1].failed, updates[-1].stored) == (3, 2)


async def test_an_ingest_acknowledges_while_the_sender_waits():
    answered: asyncio.Queue = asyncio.Queue()

    async def polite():
        for document in docs("a", "b", "c"):
            yield document
            assert await answered.get() == document.id

    async with gateway_over(Fakes()) as address, AsyncClient(address) as client:
        async for update in client.ingest(polite()):
            for result in update.results:
                answered.put_nowait(result.id)
    assert update.stored == 3


async def test_an_ingest_ends_with_the_error_that_concerns_all():
    fakes = Fakes()
    fakes.index.broken = PreconditionError("the corpus holds vectors of embedder-0")
    async with gateway_over(fakes) as address, AsyncClient(address) as client:
        with pytest.raises(PreconditionError, match="embedder-0"):
            await collect(client.ingest(stream(docs("a"))))


async def test_a_failing_source_of_documents_is_raised_to_its_owner():
    async def breaks():
        yield docs("a")[0]
        raise ZeroDivisionError("the reader broke")

    def breaks_blocking():
        yield docs("a")[0]
        raise ZeroDivisionError("the reader broke")

    async with gateway_over(Fakes()) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(ZeroDivisionError, match="reader broke"):
                await collect(client.ingest(breaks()))

        def blocking():
            with Client(address) as client, pytest.raises(ZeroDivisionError, match="reader broke"):
                list(client.ingest(breaks_blocking()))

        await asyncio.to_thread(blocking)


async def test_options_after_documents_are_refused():
    async def requests():
        yield retrieval_pb2.IngestRequest(document=retrieval_pb2.IngestDocument(id="a"))
        yield retrieval_pb2.IngestRequest(options=retrieval_pb2.IngestOptions())

    async with gateway_over(Fakes()) as address, grpc.aio.insecure_channel(address) as channel:
        call = retrieval_pb2_grpc.RetrievalServiceStub(channel).Ingest(requests())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


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


async def test_the_gateway_serves_when_its_stages_do_and_not_after(monkeypatch):
    monkeypatch.setattr(gateway, "POLL_S", 0.05)
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
        watching.cancel()
