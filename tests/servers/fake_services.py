"""The stage services over fakes: real gRPC servers on free ports, answers worked out by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from servers import convert
from servers.errors import ErrorInterceptor
from servers.runtime import SERVER_OPTIONS
from tests.cascade.fakes import (
    FakeEmbedder,
    FakeReasoner,
    FakeReranker,
    ResumableIndex,
    UnifiedReasoner,
)
from tte.v1 import (
    embedder_pb2_grpc,
    index_pb2,
    index_pb2_grpc,
    reasoner_pb2_grpc,
    reranker_pb2_grpc,
)
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.limits import MAX_BATCH_ITEMS, MAX_DELETE_IDS


@dataclass
class Fakes:
    """The four fakes, and what reached them: metadata of every call by method name."""

    reasoner: FakeReasoner = field(default_factory=FakeReasoner)
    embedder: FakeEmbedder = field(default_factory=FakeEmbedder)
    index: ResumableIndex = field(default_factory=ResumableIndex)
    reranker: FakeReranker = field(default_factory=FakeReranker)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    largest_get: int = 64
    refused: int = 0

    def note(self, method: str, context: grpc.aio.ServicerContext) -> float | None:
        self.metadata[method] = dict(context.invocation_metadata() or ())
        return context.time_remaining()


class FakeServicer(
    reasoner_pb2_grpc.ReasonerServiceServicer, embedder_pb2_grpc.EmbedderServiceServicer
):
    """Reasoner and embedder; the names of their RPCs differ."""

    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes

    async def Reason(self, request, context):
        left = self.fakes.note("Reason", context)
        items, tokens, _ = convert.reason_arguments(request)
        fake, embeddings = self.fakes.reasoner, [None] * len(items)
        if not request.embed:
            reasonings, usage = await fake.reason(items, max_tokens=tokens, timeout_s=left)
        elif isinstance(fake, UnifiedReasoner):
            reasonings, embeddings, usage = await fake.reason_and_embed(
                items, max_tokens=tokens, timeout_s=left
            )
        else:
            self.fakes.refused += 1
            raise UnsupportedError("it only reasons", reason="NOT_UNIFIED")
        # Results may come in any order.
        for index in reversed(range(len(items))):
            yield convert.reason_result(index, reasonings[index], embeddings[index])
        yield convert.reason_usage(usage)

    async def Embed(self, request, context):
        left = self.fakes.note("Embed", context)
        items, dimension = convert.embed_arguments(request)
        return convert.embed_response(
            *await self.fakes.embedder.embed(items, dimension=dimension, timeout_s=left)
        )


class FakeRerankerServicer(reranker_pb2_grpc.RerankerServiceServicer):
    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes

    async def Rerank(self, request, context):
        left = self.fakes.note("Rerank", context)
        query, candidates, instruction = convert.rerank_arguments(request)
        return convert.rerank_response(
            *await self.fakes.reranker.rerank(
                query, candidates, instruction=instruction, timeout_s=left
            )
        )


class FakeIndexServicer(index_pb2_grpc.IndexServiceServicer):
    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes

    async def Search(self, request, context):
        left = self.fakes.note("IndexSearch", context)
        vector, k, filter = convert.index_search_arguments(request)
        return convert.index_search_response(
            *await self.fakes.index.search(vector, k=k, filter=filter, timeout_s=left)
        )

    async def Upsert(self, request, context):
        left = self.fakes.note("Upsert", context)
        entries = convert.upsert_entries(request)
        sequence = await self.fakes.index.upsert(entries, timeout_s=left)
        return index_pb2.UpsertResponse(sequence=sequence)

    async def Delete(self, request, context):
        ids = convert.document_ids(request.ids, MAX_DELETE_IDS)
        deleted, unknown = await self.fakes.index.delete(ids)
        return index_pb2.DeleteResponse(deleted_ids=deleted, unknown_ids=unknown)

    async def Get(self, request, context):
        ids = convert.document_ids(request.ids, MAX_BATCH_ITEMS)
        if len(ids) > self.fakes.largest_get and not request.omit_media:
            raise InvalidInputError("too large", field="ids", reason="RESPONSE_TOO_LARGE")
        documents = await self.fakes.index.get(ids)
        response = convert.get_response(ids, documents, omit_media=request.omit_media)
        stored = await self.fakes.index.existing(ids)
        response.versions.extend(
            index_pb2.DocumentVersions(
                content_hash=stored[document.id].content_hash,
                reasoner_version=stored[document.id].reasoner_version,
                embedder_version=stored[document.id].embedder_version,
            )
            for document in response.documents
        )
        return response


@asynccontextmanager
async def listening(*add: Any, credentials: Any = None, interceptors: Any = None):
    """A server on a free port of 127.0.0.1; `add` are called with it. Yields its port."""
    server = grpc.aio.server(
        interceptors=(ErrorInterceptor(),) if interceptors is None else interceptors,
        options=SERVER_OPTIONS,
    )
    for one in add:
        one(server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def stages(fakes: Fakes, **options: Any) -> AsyncIterator[str]:
    """One server with the four stage services, all SERVING. Yields its address."""
    both = FakeServicer(fakes)
    status: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("Reasoner", "Embedder", "Index", "Reranker"):
        await status.set(f"tte.v1.{name}Service", health_pb2.HealthCheckResponse.SERVING)

    def add(server: grpc.aio.Server) -> None:
        reasoner_pb2_grpc.add_ReasonerServiceServicer_to_server(both, server)
        embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(both, server)
        reranker_pb2_grpc.add_RerankerServiceServicer_to_server(FakeRerankerServicer(fakes), server)
        index_pb2_grpc.add_IndexServiceServicer_to_server(FakeIndexServicer(fakes), server)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)

    async with listening(add, **options) as port:
        yield f"127.0.0.1:{port}"
