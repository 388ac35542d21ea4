"""Many query vectors in one call: through the service and both clients, and its limits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest

from servers import convert
from tests.index.documents import make_entry, random_units
from tests.servers.index_in_process import listening
from tests.servers.test_index_service import refused
from tte.v1 import index_pb2, index_pb2_grpc
from tte_jax import codec, limits
from tte_jax.client import IndexClient, RemoteIndex
from tte_jax.content import Reasoning, Usage
from tte_jax.errors import InternalError, InvalidInputError, PreconditionError
from tte_jax.filters import Range
from tte_jax.stages import Hit

RNG = np.random.default_rng(0)
DOCUMENTS = random_units(RNG, 40, 8)
QUERIES = random_units(RNG, 300, 8)


@pytest.fixture
async def address(tmp_path):
    async with listening(tmp_path) as address:
        index = RemoteIndex(address)
        await index.upsert(
            [make_entry(f"d{i:02d}", v, metadata={"n": i}) for i, v in enumerate(DOCUMENTS)]
        )
        await index.close()
        yield address


async def test_both_clients_get_what_single_searches_get(address):
    index = RemoteIndex(address)
    condition = Range("n", at_least=10)
    # More than one call holds.
    found, usage = await index.search_batch(
        QUERIES, k=7, filter=condition, embedder_version="e1", timeout_s=60
    )
    alone = [(await index.search(q, k=7, filter=condition))[0] for q in QUERIES[::30]]
    assert len(found) == len(QUERIES) > limits.MAX_SEARCH_VECTORS
    assert found[::30] == alone
    assert found[0][0].reasoning.answer == found[0][0].id
    assert usage.stage == "index" and usage.compute_s > 0

    def blocking():
        with IndexClient(address) as client:
            return (
                client.search_batch(QUERIES, k=7, filter=condition)[0],
                client.search(QUERIES[0], k=7, filter=condition)[0],
            )

    together, single = await asyncio.to_thread(blocking)
    assert together == found
    assert single == found[0]
    bare, _ = await index.search_batch(QUERIES, k=7, filter=condition, ids_only=True)
    assert bare == [[Hit(h.id, h.cosine) for h in hits] for hits in found]
    assert await index.search_batch(QUERIES[:0], k=7) == ([], Usage("index"))
    assert [len(hits) for hits in (await index.search_batch(QUERIES[:2], k=1000))[0]] == [40, 40]
    with pytest.raises(PreconditionError) as caught:
        await index.search_batch(QUERIES, k=7, embedder_version="e2")
    assert caught.value.reason == "EMBEDDER_MISMATCH"
    await index.close()


def request(vectors, k=5, **more) -> index_pb2.SearchBatchRequest:
    return index_pb2.SearchBatchRequest(
        vectors=[codec.encode_vector(v) for v in vectors], k=k, **more
    )


async def test_limits_name_the_field(address):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    async with grpc.aio.insecure_channel(address) as channel:
        search = index_pb2_grpc.IndexServiceStub(channel).SearchBatch
        most = await search(request(QUERIES[:256], 64))
        assert len(most.results) == 256
        for bad, field in (
            (request([]), "vectors"),
            (request(QUERIES[:257]), "vectors"),
            (request(QUERIES[:256], 65), "vectors"),
            (request(QUERIES[:1], 0), "k"),
            (request(QUERIES[:1], 1001), "k"),
            (request([QUERIES[0], QUERIES[1][:4]]), "vectors[1].dimension"),
            (request([QUERIES[0], np.zeros(8, np.float32)]), "vectors[1]"),
            (request([QUERIES[0], np.full(8, np.nan, np.float32)]), "vectors[1].data"),
        ):
            code, _, fields = await refused(search(bad))
            assert (code, fields) == (invalid, [field])
        code, reason, _ = await refused(search(request(QUERIES[:2, :4])))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DIMENSION_MISMATCH")


def test_hits_that_do_not_fit_into_a_message_are_refused_with_a_way_out():
    long = Hit("a", 0.5, Reasoning("x" * 2**20, "", "", 1, False), {})
    with pytest.raises(InvalidInputError) as caught:
        convert.search_batch_response([[long] * 8] * 4, Usage("index"), ids_only=False)
    assert (caught.value.reason, caught.value.field) == ("RESPONSE_TOO_LARGE", "vectors")
    bare = convert.search_batch_response([[long] * 8] * 4, Usage("index"), ids_only=True)
    assert bare.ByteSize() < 1000


async def test_a_client_asks_for_less_at_a_time_when_the_hits_are_too_large(tmp_path):
    # 15 hits of 1.5 MB for each vector: a message holds those of one vector.
    async with listening(tmp_path) as address:
        index = RemoteIndex(address)
        for i, vector in enumerate(DOCUMENTS[:15]):
            entry = make_entry(f"d{i:02d}", vector)
            long = replace(entry.document, reasoning=Reasoning("x" * 1_500_000, "", "", 1, False))
            await index.upsert([replace(entry, document=long)])
        found, _ = await index.search_batch(QUERIES[:5], k=15, timeout_s=60)
        assert [len(hits) for hits in found] == [15] * 5
        assert {len(hit.reasoning.text) for hits in found for hit in hits} == {1_500_000}
        await index.close()


async def test_an_answer_of_another_length_is_the_peers_defect():
    batch = index_pb2.SearchBatchResponse(results=[index_pb2.SearchBatchResult()])

    class Bad(index_pb2_grpc.IndexServiceServicer):
        async def SearchBatch(self, request, context):
            return batch

    server = grpc.aio.server()
    index_pb2_grpc.add_IndexServiceServicer_to_server(Bad(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    index = RemoteIndex(f"127.0.0.1:{port}")
    with pytest.raises(InternalError, match="2 vectors with 1 results"):
        await index.search_batch(QUERIES[:2], k=1)
    await index.close()
    await server.stop(None)
