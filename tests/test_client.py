"""The stages over real gRPC to fake services, and what becomes of errors, deadlines and retries."""

import asyncio
import socket
import subprocess

import grpc
import numpy as np
import pytest

from tests.cascade.fakes import ecr
from tests.servers.fake_services import Fakes, listening, stages
from tte.v1 import embedder_pb2, embedder_pb2_grpc, vector_pb2
from tte_jax.client import (
    AsyncClient,
    Client,
    Endpoint,
    RemoteEmbedder,
    RemoteIndex,
    RemoteReasoner,
    RemoteReranker,
    Tls,
)
from tte_jax.client.status import make_error
from tte_jax.content import NO_REASONING, Content, Document, Media, MediaKind, Side, Task, Text
from tte_jax.errors import (
    AccessError,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    StorageFullError,
    UnavailableError,
    UnsupportedError,
)
from tte_jax.filters import AllOf, Equals, Not, Range
from tte_jax.stages import (
    EmbedItem,
    IndexEntry,
    ReasonItem,
    ResumableIndexStage,
    StoredVersions,
)

EVERYTHING = Content(
    (
        Media(b"png"),
        Media(b"mp4", MediaKind.VIDEO),
        Media(b"pdf", MediaKind.PAGE, page=3),
        Text("the same, but blue"),
    )
)
REFUSED = ("UNREADABLE_IMAGE", "inputs[0].content.parts[0].image.data")


def unit(*values: float) -> np.ndarray:
    row = np.zeros(26, np.float32)
    row[: len(values)] = values
    return row / np.linalg.norm(row)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- the stages ---


async def test_reasoner_items_and_answers_survive_the_wire():
    fakes = Fakes()
    fakes.reasoner.table["the same, but blue|ask"] = ecr("rewritten", "blue", tokens=9)
    item = ReasonItem(
        content=EVERYTHING,
        side=Side.DOCUMENT,
        instruction="find",
        task=Task.REWRITE,
        query=Content.of("ask"),
        query_reasoning="<think>q</think>",
        candidate_reasoning="<think>c</think>",
    )
    other = ReasonItem(content=Content.of("plain"), side=Side.QUERY)
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        reasonings, usage = await reasoner.reason([item, other], max_tokens=17, timeout_s=5)
        await reasoner.close()
    assert fakes.reasoner.items == [item, other]
    assert fakes.reasoner.max_tokens == [17]
    # The service answers the inputs in reverse order.
    assert reasonings == [ecr("rewritten", "blue", tokens=9), ecr("plain", "plain")]
    assert (usage.tokens_in, usage.tokens_out, usage.queue_s, usage.compute_s) == (
        14,
        13,
        0.25,
        0.5,
    )
    assert usage.model_version == "reasoner-1"


async def test_embedder_items_and_vectors_survive_the_wire():
    fakes = Fakes()
    items = [
        EmbedItem(EVERYTHING, Side.QUERY, "<think></think>Answer: aab", "find"),
        EmbedItem(Content.of("cc"), Side.DOCUMENT),
    ]
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(address)
        vectors, usage = await embedder.embed(items, timeout_s=5)
        await embedder.close()
    assert fakes.embedder.items == items
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.stack([unit(2, 1), unit(0, 0, 1)]))
    assert usage.model_version == "embedder-1"


async def test_reranker_texts_and_scores_survive_the_wire():
    fakes = Fakes()
    async with stages(fakes) as address:
        reranker = RemoteReranker(address)
        scores, usage = await reranker.rerank("red cat", ["red dog", "red cat", "x"], timeout_s=5)
        await reranker.close()
    assert scores.tolist() == [0.5, 1.0, 0.0]
    assert scores.dtype == np.float32
    assert (usage.tokens_in, usage.cached_tokens) == (33, 3)


async def test_index_writes_reads_and_versions_survive_the_wire():
    fakes = Fakes()
    metadata = {"name": "cat", "n": 3, "weight": 0.5, "real": True}
    document = Document("cat", EVERYTHING, metadata, ecr("a cat", "cat"))
    entry = IndexEntry(document, unit(2, 1), "r-1@64", "e-1")
    async with stages(fakes) as address:
        index = RemoteIndex(address)
        assert isinstance(index, ResumableIndexStage)
        plain = Document("dog", Content.of("dog"))
        assert await index.upsert([entry, IndexEntry(plain, unit(0, 1))], timeout_s=5) == 2
        condition = AllOf((Range("n", at_least=1), Not(Equals("real", False))))
        hits, usage = await index.search(unit(1), k=5, filter=condition, timeout_s=5)
        assert [(h.id, h.metadata, h.reasoning) for h in hits] == [
            ("cat", metadata, document.reasoning)
        ]
        assert hits[0].cosine == pytest.approx(2 / np.sqrt(5))
        assert usage.stage == "index"
        # Types survive too: a flag stays a flag.
        assert [type(v) for v in hits[0].metadata.values()] == [
            type(metadata[key]) for key in hits[0].metadata
        ]
        assert await index.get(["no", "cat"], timeout_s=5) == [None, document]
        assert await index.existing(["cat", "no"], timeout_s=5) == {
            "cat": StoredVersions(EVERYTHING.content_hash, "r-1@64", "e-1", metadata)
        }
        assert await index.delete(["dog", "no"], timeout_s=5) == (["dog"], ["no"])
        await index.close()
    stored = fakes.index.entries["cat"]
    assert (stored.document, stored.reasoner_version) == (document, "r-1@64")
    np.testing.assert_array_equal(stored.vector, entry.vector)


async def test_many_and_large_documents_are_read_in_several_calls():
    fakes = Fakes(largest_get=3)
    for number in range(100):
        fakes.index.put(f"d{number}", NO_REASONING)
    ids = [f"d{number}" for number in range(100)]
    async with stages(fakes) as address:
        index = RemoteIndex(address)
        documents = await index.get(ids)
        assert len(await index.existing(ids)) == 100
        await index.close()
    assert [document.id for document in documents if document] == ids


async def test_a_malformed_answer_is_the_peers_defect():
    class Bad(embedder_pb2_grpc.EmbedderServiceServicer):
        async def Embed(self, request, context):
            # Two bytes too few for one input; for two inputs one vector too few.
            data = bytes(2 * len(request.inputs))
            vector = vector_pb2.Vector(data=data, dtype=vector_pb2.DTYPE_FLOAT32, dimension=1)
            return embedder_pb2.EmbedResponse(embeddings=[vector])

    add = embedder_pb2_grpc.add_EmbedderServiceServicer_to_server
    async with listening(lambda server: add(Bad(), server)) as port:
        embedder = RemoteEmbedder(f"127.0.0.1:{port}")
        with pytest.raises(InternalError, match="malformed answer"):
            await embedder.embed([EmbedItem(Content.of("a"), Side.QUERY)])
        with pytest.raises(InternalError, match="2 inputs with 1 vectors"):
            await embedder.embed([EmbedItem(Content.of("a"), Side.QUERY)] * 2)
        await embedder.close()


# --- errors ---

ERRORS = [
    InvalidInputError("not an image", field=REFUSED[1], reason=REFUSED[0], bytes=12),
    NotFoundError("no such model"),
    PreconditionError("dimension 8, corpus has 16", reason="DIMENSION"),
    OverloadedError("the queue is full", retry_after_s=2.5),
    StorageFullError("the disk is full"),
    UnavailableError("warming up", retry_after_s=0.75, reason="WARMING_UP"),
    DeadlineExceededError("too little time", stage="embed"),
    DataLossError("checksum"),
    InternalError("NaN", reason="NOT_FINITE"),
    UnsupportedError("this model reads no images"),
    AccessError("the token is wrong"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_every_error_comes_back_as_it_was_raised(error):
    fakes = Fakes()
    fakes.embedder.broken = error
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(address)
        with pytest.raises(type(error)) as caught:
            await embedder.embed([EmbedItem(Content.of("a"), Side.QUERY)], timeout_s=10)
        await embedder.close()
    back = caught.value
    assert type(back) is type(error)
    assert (back.message, back.reason, back.metadata) == (
        error.message, error.reason, error.metadata,
    )  # fmt: skip
    assert getattr(back, "field", "") == getattr(error, "field", "")
    assert getattr(back, "retry_after_s", 0) == getattr(error, "retry_after_s", 0)


async def test_errors_of_a_stream_come_back_too():
    fakes = Fakes()
    fakes.reasoner.broken = ERRORS[0]
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        with pytest.raises(InvalidInputError) as caught:
            await reasoner.reason([ReasonItem(Content.of("a"), Side.QUERY)], max_tokens=4)
        await reasoner.close()
    assert (caught.value.reason, caught.value.field) == REFUSED


async def test_an_unexpected_error_keeps_its_text_to_itself():
    fakes = Fakes()
    fakes.embedder.broken = ZeroDivisionError("secret")
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(address)
        with pytest.raises(InternalError) as caught:
            await embedder.embed([EmbedItem(Content.of("a"), Side.QUERY)])
        await embedder.close()
    assert "secret" not in caught.value.message


def test_codes_without_a_type_of_their_own_are_internal():
    assert type(make_error("ABORTED", "x")) is InternalError
    assert type(make_error("OUT_OF_RANGE", "x")) is InvalidInputError
    assert type(make_error("PERMISSION_DENIED", "x")) is AccessError


async def test_a_service_that_is_not_there_is_named():
    address = f"127.0.0.1:{free_port()}"
    index = RemoteIndex(address)
    with pytest.raises(UnavailableError, match=f"the index at {address} cannot be reached"):
        await index.search(unit(1), k=1, timeout_s=5)
    assert await index.serving() is False
    await index.close()


async def test_another_kind_of_server_is_named():
    async with listening() as port:
        index = RemoteIndex(f"127.0.0.1:{port}")
        with pytest.raises(UnsupportedError, match="does not offer this call"):
            await index.search(unit(1), k=1, timeout_s=5)
        await index.close()


async def test_a_message_that_is_too_large_is_the_callers_fault_and_not_overload():
    async with stages(Fakes()) as address:
        embedder = RemoteEmbedder(address)
        large = EmbedItem(Content.of("", bytes(40 << 20)), Side.DOCUMENT)
        with pytest.raises(InvalidInputError) as caught:
            await embedder.embed([large], timeout_s=20)
        await embedder.close()
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


# --- deadlines, cancellation, retries ---


async def test_deadlines_reach_the_service_and_end_the_call():
    fakes = Fakes()
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(address)
        item = EmbedItem(Content.of("a"), Side.QUERY)
        await embedder.embed([item], timeout_s=30)
        assert 0 < fakes.embedder.timeouts[0] <= 30
        await embedder.embed([item])
        assert fakes.embedder.timeouts[1] is None
        fakes.embedder.delay = 60
        with pytest.raises(DeadlineExceededError):
            await embedder.embed([item], timeout_s=0.2)
        await embedder.close()


@pytest.mark.parametrize("stage", ["reasoner", "embedder"])
async def test_cancelling_a_call_cancels_the_work(stage):
    fakes = Fakes()
    behaviour = getattr(fakes, stage)
    behaviour.delay = 60
    async with stages(fakes) as address:
        if stage == "reasoner":
            remote = RemoteReasoner(address)
            call = remote.reason([ReasonItem(Content.of("a"), Side.QUERY)], max_tokens=4)
        else:
            remote = RemoteEmbedder(address)
            call = remote.embed([EmbedItem(Content.of("a"), Side.QUERY)])
        task = asyncio.create_task(call)
        await until(lambda: behaviour.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: behaviour.cancelled == 1)
        await remote.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (UnavailableError("restarting"), 3),
        (OverloadedError("full"), 1),
        (InternalError("NaN"), 1),
        (DeadlineExceededError("late"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_only_unavailable_is_tried_again(error, calls):
    fakes = Fakes()
    fakes.embedder.errors = [error, error]
    item = EmbedItem(Content.of("a"), Side.QUERY)
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(address)
        if calls == 3:
            await embedder.embed([item], timeout_s=20)
        else:
            with pytest.raises(type(error)):
                await embedder.embed([item], timeout_s=20)
        await embedder.close()
    assert fakes.embedder.calls == calls


async def test_health_of_a_service():
    async with stages(Fakes()) as address:
        for kind in (RemoteReasoner, RemoteEmbedder, RemoteIndex, RemoteReranker):
            remote = kind(address)
            assert await remote.serving(timeout_s=5) is True
            await remote.close()


# --- endpoints ---


def test_targets_and_tokens():
    assert Endpoint("host:50060").target == "dns:///host:50060"
    assert Endpoint("dns:///a.b:1").target == "dns:///a.b:1"
    assert Endpoint("unix:/run/tte.sock").target == "unix:/run/tte.sock"
    assert Endpoint("h:1").metadata == ()
    assert Endpoint("h:1", token="t").metadata == (("authorization", "Bearer t"),)
    assert ("grpc.enable_http_proxy", 0) in Endpoint("127.0.0.1:1").options
    assert ("grpc.enable_http_proxy", 0) not in Endpoint("tte.example:1").options


async def test_the_token_travels_with_every_call():
    fakes = Fakes()
    async with stages(fakes) as address:
        embedder = RemoteEmbedder(Endpoint(address, token="secret"))
        await embedder.embed([EmbedItem(Content.of("a"), Side.QUERY)])
        reasoner = RemoteReasoner(Endpoint(address, token="secret"))
        await reasoner.reason([ReasonItem(Content.of("a"), Side.QUERY)], max_tokens=4)
        await embedder.close()
        await reasoner.close()
    assert fakes.metadata["Embed"]["authorization"] == "Bearer secret"
    assert fakes.metadata["Reason"]["authorization"] == "Bearer secret"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-keyout key.pem -out cert.pem -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl program to make a certificate")
    return (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()


async def test_tls_and_a_certificate_that_is_not_trusted(certificate):
    key, cert = certificate
    fakes = Fakes()
    item = EmbedItem(Content.of("a"), Side.QUERY)
    async with stages(fakes, credentials=grpc.ssl_server_credentials([(key, cert)])) as address:
        address = address.replace("127.0.0.1", "localhost")
        trusting = RemoteEmbedder(Endpoint(address, tls=Tls(roots=cert)))
        await trusting.embed([item], timeout_s=10)
        await trusting.close()
        for endpoint in (Endpoint(address, tls=Tls()), Endpoint(address)):
            refused = RemoteEmbedder(endpoint)
            with pytest.raises(UnavailableError):
                await refused.embed([item], timeout_s=10)
            await refused.close()
    assert fakes.embedder.calls == 1


async def test_the_users_clients_say_where_nothing_answers():
    address = f"127.0.0.1:{free_port()}"
    async with AsyncClient(address) as client:
        with pytest.raises(UnavailableError, match=f"the gateway at {address}"):
            await client.get_document("x", timeout_s=5)

    def blocking():
        with Client(address) as client, pytest.raises(UnavailableError, match=address):
            client.get_document("x", timeout_s=5)

    await asyncio.to_thread(blocking)
