"""Every bad input is a clear error with its code, and harms nobody else."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from servers import runtime
from tests import tiny_models
from tests.system.running import PATIENCE_S, ROOT, System, command, documents
from tte.v1 import (
    content_pb2,
    embedder_pb2,
    embedder_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    retrieval_pb2,
    retrieval_pb2_grpc,
)
from tte_jax.cascade import IngestOptions, ItemState
from tte_jax.client import Client
from tte_jax.content import Content, Document
from tte_jax.errors import InvalidInputError

# What Python says about itself: none of it belongs into a message to a caller.
INTERNALS = re.compile(r"Traceback|File \"|\.py\b|line \d+, in|Exception|Error\(|0x[0-9a-f]{6}")


def huge_png() -> bytes:
    """A PNG of 57 bytes whose header says 10,000 x 10,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD_IMAGES = {
    "unreadable": (b"these bytes are no image", "UNREADABLE_IMAGE"),
    "cut short": (tiny_models.png(3)[:200], "BROKEN_IMAGE"),
    "zero bytes": (b"", "EMPTY_MEDIA"),
    "100 megapixels": (huge_png(), "IMAGE_TOO_LARGE"),
}
bad_images = pytest.mark.parametrize(("data", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES)


@pytest.fixture(autouse=True)
def unharmed(system: System) -> Iterator[None]:
    """The services are the same processes afterwards, and all work."""
    before = system.pids
    yield
    assert system.pids == before
    system.assert_healthy()


def image(data: bytes) -> content_pb2.Content:
    return content_pb2.Content(parts=[content_pb2.Part(image=content_pb2.Image(data=data))])


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str]:
    """(code, reason, field) of the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    reason = field = ""
    status = rpc_status.from_call(error)
    assert status is not None and len(status.message) > 10
    assert not INTERNALS.search(error.details()), error.details()
    for packed in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(info):
            reason = info.reason
        elif packed.Unpack(bad):
            field = bad.field_violations[0].field
            assert not INTERNALS.search(bad.field_violations[0].description)
    return error.code(), reason, field


def search(system: System, request: retrieval_pb2.SearchRequest) -> list[Any]:
    with grpc.insecure_channel(system.addresses["gateway"]) as channel:
        return list(retrieval_pb2_grpc.RetrievalServiceStub(channel).Search(request, timeout=60))


@bad_images
def test_a_bad_image_in_a_search(system: System, data: bytes, reason: str) -> None:
    request = retrieval_pb2.SearchRequest(query=image(data))
    assert refused(lambda: search(system, request)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        reason,
        "query.parts[0].image.data",
    )


@bad_images
def test_a_bad_image_for_a_model_service(system: System, data: bytes, reason: str) -> None:
    good, bad = image(tiny_models.png(1)), image(data)
    expected = (
        grpc.StatusCode.INVALID_ARGUMENT,
        reason,
        "inputs[1].content.parts[0].image.data",
    )
    sides = {"side": content_pb2.SIDE_DOCUMENT}
    with grpc.insecure_channel(system.addresses["embedder"]) as channel:
        inputs = [embedder_pb2.EmbedInput(content=c, **sides) for c in (good, bad)]
        request = embedder_pb2.EmbedRequest(inputs=inputs)
        embed = embedder_pb2_grpc.EmbedderServiceStub(channel).Embed
        assert refused(lambda: embed(request, timeout=60)) == expected
    with grpc.insecure_channel(system.addresses["reasoner"]) as channel:
        inputs = [reasoner_pb2.ReasonInput(content=c, **sides) for c in (good, bad)]
        asked = reasoner_pb2.ReasonRequest(inputs=inputs, max_tokens=4)
        reason_rpc = reasoner_pb2_grpc.ReasonerServiceStub(channel).Reason
        assert refused(lambda: list(reason_rpc(asked, timeout=60))) == expected


def test_bad_images_in_an_ingest_fail_alone(client: Client) -> None:
    (good,) = documents(1, prefix="among-bad")
    bad = [Document(f"bad-{i}", Content.of("", d)) for i, (d, _) in enumerate(BAD_IMAGES.values())]
    options = IngestOptions(reasoning_tokens=8)
    updates = list(client.ingest([*bad[:2], good, *bad[2:]], options, timeout_s=120))
    assert (updates[-1].stored, updates[-1].failed) == (1, len(bad))
    results = {result.id: result for update in updates for result in update.results}
    assert results.pop(good.id).state is ItemState.STORED
    for document, (_, reason) in zip(bad, BAD_IMAGES.values(), strict=True):
        error = results[document.id].error
        assert isinstance(error, InvalidInputError) and error.reason == reason
        assert error.field == "document.content.parts[0].image.data"
        assert not INTERNALS.search(error.message)


@pytest.mark.parametrize(
    "content",
    [
        content_pb2.Content(),
        content_pb2.Content(parts=[content_pb2.Part(text=" \n ")]),
    ],
    ids=["no parts", "blank text"],
)
def test_an_empty_query(system: System, content: content_pb2.Content) -> None:
    code, _, field = refused(lambda: search(system, retrieval_pb2.SearchRequest(query=content)))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "query")


def test_an_unknown_document(system: System) -> None:
    with grpc.insecure_channel(system.addresses["gateway"]) as channel:
        stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)
        request = retrieval_pb2.GetDocumentRequest(id="never-stored")
        answer = refused(lambda: stub.GetDocument(request, timeout=60))
        assert answer == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "")
        unknown = retrieval_pb2.DeleteDocumentsRequest(ids=["never-stored"])
        assert stub.DeleteDocuments(unknown, timeout=60).unknown_ids == ["never-stored"]


def ended(*arguments: str) -> tuple[int, str]:
    """(exit code, what it said) of a service that cannot start."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    return done.returncode, said


def test_an_unknown_model_directory(system: System, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    code, said = ended(*command("embedder", "--port=0", f"--embedder-model={missing}"))
    assert code == runtime.EXIT_CONFIGURATION
    assert f"{missing} is neither a directory nor a built-in model" in said


def test_a_port_in_use(system: System, tmp_path: Path) -> None:
    port = system.addresses["gateway"].rpartition(":")[2]
    code, said = ended(*command("index", f"--port={port}", f"--data-dir={tmp_path}"))
    assert code == runtime.EXIT_PORT_IN_USE
    assert f"port {port}" in said and "--port" in said
