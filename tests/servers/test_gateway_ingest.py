"""Ingest through the gateway."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from servers import index, runtime
from servers.settings import Settings
from tests.servers.fake_services import Fakes
from tests.servers.gateway_over_fakes import (
    FAILED,
    SKIPPED,
    STORED,
    collect,
    docs,
    gateway_over,
    ids,
    outcome,
    stream,
)
from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax.cascade import (
    IngestOptions,
    SearchQuery,
)
from tte_jax.client import AsyncClient, Client
from tte_jax.content import Content, Document
from tte_jax.errors import (
    InvalidInputError,
    NotFoundError,
    PreconditionError,
)
from tte_jax.filters import Range


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
