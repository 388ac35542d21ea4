"""IndexService over real gRPC: in this process, and as a process that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from servers import runtime
from tests.index.documents import make_entry, random_units, unit
from tests.servers.index_in_process import listening
from tte.v1 import index_pb2, index_pb2_grpc
from tte_jax import codec, limits
from tte_jax.content import Media, Text
from tte_jax.filters import Equals

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def serving(data_dir: Path) -> AsyncIterator[index_pb2_grpc.IndexServiceAsyncStub]:
    options = [("grpc.max_receive_message_length", 2 * limits.MAX_MESSAGE_BYTES)]
    async with (
        listening(data_dir) as address,
        grpc.aio.insecure_channel(address, options=options) as channel,
    ):
        yield index_pb2_grpc.IndexServiceStub(channel)


@pytest.fixture
async def stub(tmp_path):
    async with serving(tmp_path) as stub:
        yield stub


def upsert(*entries) -> index_pb2.UpsertRequest:
    return index_pb2.UpsertRequest(entries=[codec.encode_entry(entry) for entry in entries])


def search(vector, k=10, condition=None) -> index_pb2.IndexServiceSearchRequest:
    request = index_pb2.IndexServiceSearchRequest(vector=codec.encode_vector(vector), k=k)
    if condition is not None:
        request.filter.CopyFrom(codec.encode_filter(condition))
    return request


async def refused(call) -> tuple[grpc.StatusCode, str, list[str]]:
    """(code, reason, field paths) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    reason, fields = "", []
    for detail in status.details if status else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
    return caught.value.code(), reason, fields


async def test_a_document_s_life(stub):
    cat = make_entry("cat", unit(1, 0), image=b"png", metadata={"n": 1, "ok": True})
    dog = make_entry("dog", unit(0, 1), metadata={"n": 2})
    assert (await stub.Upsert(upsert(cat, dog))).sequence == 2

    found = await stub.Search(search(unit(1, 0.2)))
    hits = [codec.decode_hit(hit) for hit in found.hits]
    assert [hit.id for hit in hits] == ["cat", "dog"]
    assert hits[0].cosine == pytest.approx(float(unit(1, 0.2)[0]))
    assert hits[0].reasoning == cat.document.reasoning
    assert hits[0].metadata == {"n": 1, "ok": True}
    assert found.usage.stage == "index"
    assert found.usage.compute_seconds > 0.0
    found = await stub.Search(search(unit(1, 0.2), 1, Equals("n", 2)))
    assert [hit.id for hit in found.hits] == ["dog"]

    got = await stub.Get(index_pb2.GetRequest(ids=["dog", "bird", "cat"]))
    assert [d.id for d in got.documents] == ["dog", "cat"]
    assert list(got.unknown_ids) == ["bird"]
    assert [d.sequence for d in got.documents] == [2, 1]
    assert codec.decode_content(got.documents[1].content, "") == cat.document.content
    assert [v.content_hash for v in got.versions] == [
        dog.document.content.content_hash,
        cat.document.content.content_hash,
    ]
    assert {(v.reasoner_version, v.embedder_version) for v in got.versions} == {("r1", "e1")}
    bare = await stub.Get(index_pb2.GetRequest(ids=["cat"], omit_media=True))
    assert codec.decode_content(bare.documents[0].content, "").parts == (Text("text of cat"),)
    assert bare.versions[0].content_hash == cat.document.content.content_hash

    gone = await stub.Delete(index_pb2.DeleteRequest(ids=["cat", "bird"]))
    assert (list(gone.deleted_ids), list(gone.unknown_ids)) == (["cat"], ["bird"])
    assert [hit.id for hit in (await stub.Search(search(unit(1, 0)))).hits] == ["dog"]


async def test_stats_snapshot_and_rebuild(stub):
    empty = await stub.Stats(index_pb2.StatsRequest())
    assert (empty.documents, empty.sequence, empty.dimension, empty.kind) == (0, 0, 0, "exact")
    vectors = random_units(np.random.default_rng(0), 20, 6)
    await stub.Upsert(upsert(*(make_entry(f"d{i}", vectors[i]) for i in range(20))))
    await stub.Upsert(upsert(make_entry("picture", vectors[0], image=b"png")))
    await stub.Delete(index_pb2.DeleteRequest(ids=["d3"]))
    stats = await stub.Stats(index_pb2.StatsRequest())
    assert (stats.documents, stats.sequence, stats.dimension) == (20, 22, 6)
    assert (stats.embedder_version, stats.generation) == ("e1", 1)
    assert (stats.delta_documents, stats.tombstones) == (20, 1)
    assert (stats.recall, stats.rebuilding, stats.media_bytes) == (1.0, False, 3)
    snapshot = await stub.Snapshot(index_pb2.SnapshotRequest())
    assert snapshot.sequence == 22
    assert snapshot.bytes > 20 * 6 * 4
    rebuilt = await stub.Rebuild(index_pb2.RebuildRequest())
    assert (rebuilt.generation, rebuilt.kind, rebuilt.documents) == (2, "exact", 20)
    after = await stub.Stats(index_pb2.StatsRequest())
    assert (after.generation, after.delta_documents, after.tombstones) == (2, 0, 0)
    assert after.snapshot_sequence == 22
    assert after.database_bytes > snapshot.bytes
    assert (after.query_recall, after.checked_queries, after.last_error) == (1.0, 0, "")


async def test_errors_name_the_field_or_the_state(stub):
    await stub.Upsert(upsert(make_entry("a", unit(1, 0))))
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    state = grpc.StatusCode.FAILED_PRECONDITION

    code, _, fields = await refused(stub.Upsert(index_pb2.UpsertRequest()))
    assert (code, fields) == (invalid, ["entries"])
    twice = upsert(make_entry("b", unit(1, 0)), make_entry("b", unit(0, 1)))
    code, _, fields = await refused(stub.Upsert(twice))
    assert (code, fields) == (invalid, ["entries[1].document.id"])
    long = np.array([3.0, 4.0], np.float32)
    code, _, fields = await refused(stub.Upsert(upsert(make_entry("b", long))))
    assert (code, fields) == (invalid, ["entries[0].vector"])
    code, reason, _ = await refused(stub.Upsert(upsert(make_entry("b", unit(1, 0, 0)))))
    assert (code, reason) == (state, "DIMENSION_MISMATCH")
    other = upsert(make_entry("b", unit(1, 0), embedder="e2"))
    code, reason, _ = await refused(stub.Upsert(other))
    assert (code, reason) == (state, "EMBEDDER_MISMATCH")

    code, _, fields = await refused(stub.Search(search(unit(1, 0), 0)))
    assert (code, fields) == (invalid, ["k"])
    code, reason, _ = await refused(stub.Search(search(unit(1, 0, 0))))
    assert (code, reason) == (state, "DIMENSION_MISMATCH")
    code, _, fields = await refused(stub.Search(search(np.zeros(2, np.float32))))
    assert (code, fields) == (invalid, ["vector"])
    code, _, fields = await refused(stub.Get(index_pb2.GetRequest()))
    assert (code, fields) == (invalid, ["ids"])
    code, _, fields = await refused(stub.Delete(index_pb2.DeleteRequest(ids=["x"] * 1001)))
    assert (code, fields) == (invalid, ["ids"])
    assert (await stub.Stats(index_pb2.StatsRequest())).sequence == 1


async def test_more_media_than_a_message_holds_is_refused_with_a_way_out(stub):
    big = limits.MAX_MESSAGE_BYTES // 2 + 1
    for name in ("a", "b"):
        await stub.Upsert(upsert(make_entry(name, unit(1, 0), image=name.encode() * big)))
    code, reason, _ = await refused(stub.Get(index_pb2.GetRequest(ids=["a", "b"])))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "RESPONSE_TOO_LARGE")
    got = await stub.Get(index_pb2.GetRequest(ids=["a", "b"], omit_media=True))
    assert [d.id for d in got.documents] == ["a", "b"]
    assert len((await stub.Get(index_pb2.GetRequest(ids=["b"]))).documents) == 1


async def test_damaged_media_are_data_loss(stub, tmp_path):
    await stub.Upsert(upsert(make_entry("a", unit(1, 0), image=b"png")))
    (file,) = (tmp_path / "corpus" / "media").rglob(Media(b"png").sha256)
    file.write_bytes(b"pnG")
    code, reason, _ = await refused(stub.Get(index_pb2.GetRequest(ids=["a"])))
    assert (code, reason) == (grpc.StatusCode.DATA_LOSS, "MEDIA_DAMAGED")


async def test_another_embedder_s_vectors_are_staged_and_change_over(stub):
    entries = [make_entry(f"d{i}", unit(1, i), image=b"png") for i in range(3)]
    await stub.Upsert(upsert(*entries))
    pending = index_pb2.ListPendingRequest(embedder_version="e2", limit=2)
    listed = await stub.ListPending(pending)
    assert [d.id for d in listed.documents] == ["d0", "d1"]
    assert (listed.pending, listed.staged) == (3, 0)
    assert codec.decode_document(listed.documents[0], "").content == entries[0].document.content

    def staged(*documents, version="e2"):
        return index_pb2.StageVectorsRequest(
            embedder_version=version,
            vectors=[
                index_pb2.StagedVector(
                    id=id, sequence=number, vector=codec.encode_vector(unit(1, 2, number))
                )
                for id, number in documents
            ],
        )

    done = await stub.StageVectors(staged(("d0", 1), ("d1", 9), ("d9", 4)))
    assert list(done.stale_ids) == ["d1", "d9"]
    stats = await stub.Stats(index_pb2.StatsRequest())
    assert (stats.staged_embedder_version, stats.staged_documents) == ("e2", 1)
    state = grpc.StatusCode.FAILED_PRECONDITION
    promote = index_pb2.PromoteVectorsRequest(embedder_version="e2")
    code, reason, _ = await refused(stub.PromoteVectors(promote))
    assert (code, reason) == (state, "REEMBEDDING_INCOMPLETE")
    other = index_pb2.ListPendingRequest(embedder_version="e3", limit=2)
    code, reason, _ = await refused(stub.ListPending(other))
    assert (code, reason) == (state, "REEMBEDDING_OTHER")
    code, reason, _ = await refused(stub.StageVectors(staged(("d1", 2), version="e3")))
    assert (code, reason) == (state, "REEMBEDDING_OTHER")
    code, _, fields = await refused(stub.StageVectors(index_pb2.StageVectorsRequest()))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["vectors"])
    code, _, fields = await refused(
        stub.ListPending(index_pb2.ListPendingRequest(embedder_version="e2", limit=65))
    )
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["limit"])

    await stub.StageVectors(staged(("d1", 2), ("d2", 3)))
    report = await stub.PromoteVectors(promote)
    assert (report.documents, report.sequence) == (3, 6)
    query = search(unit(1, 2, 3), 1)
    query.embedder_version = "e2"
    assert (await stub.Search(query)).hits[0].id == "d2"
    query.embedder_version = "e1"
    code, reason, _ = await refused(stub.Search(query))
    assert (code, reason) == (state, "EMBEDDER_MISMATCH")


async def test_verify_says_what_is_wrong(stub, tmp_path):
    await stub.Upsert(upsert(make_entry("a", unit(1, 0), image=b"png")))
    verified = await stub.Verify(index_pb2.VerifyRequest())
    assert (list(verified.problems), verified.documents) == ([], 1)
    (file,) = (tmp_path / "corpus" / "media").rglob(Media(b"png").sha256)
    file.write_bytes(b"pnG")
    verified = await stub.Verify(index_pb2.VerifyRequest())
    assert len(verified.problems) == 1 and file.name in verified.problems[0]
    assert not (await stub.Verify(index_pb2.VerifyRequest(omit_media=True))).problems


async def test_searches_beside_writes_over_the_wire(stub):
    vectors = random_units(np.random.default_rng(1), 64, 8)
    await stub.Upsert(upsert(*(make_entry(f"d{i}", vectors[i]) for i in range(32))))

    async def write():
        for i in range(32):
            await stub.Upsert(upsert(make_entry(f"d{i + 32}", vectors[i + 32])))
            await stub.Delete(index_pb2.DeleteRequest(ids=[f"d{i}"]))
            found = await stub.Search(search(vectors[i + 32], 1))
            assert found.hits[0].id == f"d{i + 32}"
            assert f"d{i}" not in {h.id for h in (await stub.Search(search(vectors[i]))).hits}

    async def read():
        for i in range(64):
            assert len((await stub.Search(search(vectors[i], 20))).hits) >= 19

    await asyncio.gather(write(), read(), read())


@contextlib.contextmanager
def process(data_dir: Path, *more: str):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = (
        "import sys\n"
        "from servers import index, runtime\n"
        "from servers.settings import parse\n"
        "settings = parse(['index', *sys.argv[1:]])\n"
        "runtime.die_with_parent(settings.parent_pid)\n"
        "sys.exit(runtime.run(settings, index.create))\n"
    )
    flags = [f"--port={port}", f"--data-dir={data_dir}", f"--parent-pid={os.getpid()}"]
    flags += more
    server = subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate(timeout=30)


def warm(stub) -> index_pb2.StatsResponse:
    """Wait until the server has loaded its corpus."""
    for _ in range(200):
        try:
            return stub.Stats(index_pb2.StatsRequest(), wait_for_ready=True, timeout=60)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            time.sleep(0.05)
    raise AssertionError("the server did not become warm")


def test_killed_servers_lose_nothing_and_two_never_share_a_corpus(tmp_path):
    vectors = random_units(np.random.default_rng(2), 12, 4)
    for round in range(3):
        with process(tmp_path) as (server, address), grpc.insecure_channel(address) as channel:
            stub = index_pb2_grpc.IndexServiceStub(channel)
            assert warm(stub).documents == 3 * round
            stub.Upsert(
                upsert(*(make_entry(f"d{round}-{i}", vectors[4 * round + i]) for i in range(4)))
            )
            stub.Delete(index_pb2.DeleteRequest(ids=[f"d{round}-0"]))
            server.send_signal(signal.SIGKILL)
            server.wait(30)
    with process(tmp_path) as (server, address), grpc.insecure_channel(address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        warm(stub)
        found = stub.Search(search(vectors[0], 100))
        assert {hit.id for hit in found.hits} == {
            f"d{round}-{i}" for round in range(3) for i in (1, 2, 3)
        }
        with process(tmp_path) as (second, _):
            _, errors = second.communicate(timeout=60)
            assert second.returncode == runtime.EXIT_CONFIGURATION
            assert f"already open for writing by process {server.pid}" in errors
            assert "Traceback" not in errors
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


async def test_the_ecrs_of_a_content_are_found_whatever_the_document_s_id(stub, tmp_path):
    one = make_entry("one", unit(1, 0), text="same", image=b"png")
    await stub.Upsert(upsert(one, make_entry("other", unit(0, 1))))
    await stub.Upsert(upsert(make_entry("two", unit(1, 0), text="same", image=b"png")))
    hash_ = one.document.content.content_hash
    request = index_pb2.FindReasoningsRequest(content_hashes=[hash_, "0" * 64])
    (found,) = (await stub.FindReasonings(request)).reasonings
    assert (found.content_hash, found.reasoner_version) == (hash_, "r1")
    assert codec.decode_reasoning(found.reasoning).answer in ("one", "two")
    for bad, field in (([], "content_hashes"), (["0" * 63], "content_hashes[0]")):
        request = index_pb2.FindReasoningsRequest(content_hashes=bad)
        code, _, fields = await refused(stub.FindReasonings(request))
        assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
