"""The four stages over gRPC: the Protocols of `tte_jax.stages`, one channel each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tte.v1 import (
    embedder_pb2,
    embedder_pb2_grpc,
    index_pb2,
    index_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax import codec
from tte_jax.client.channel import Endpoint
from tte_jax.client.retries import Attempts
from tte_jax.client.status import translated
from tte_jax.content import Content, Document, Reasoning, Usage
from tte_jax.errors import InternalError, InvalidInputError, UnavailableError
from tte_jax.filters import Filter
from tte_jax.limits import MAX_BATCH_ITEMS, MAX_DELETE_IDS
from tte_jax.stages import (
    EmbedItem,
    Hit,
    IndexEntry,
    Promoted,
    ReasonItem,
    StagedVector,
    StoredVersions,
)


class _Remote:
    """A service with its channel. Make it inside the event loop that uses it."""

    service = ""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self.endpoint = Endpoint.of(endpoint)
        self.channel: grpc.aio.Channel = self.endpoint.open_async()
        self.metadata = self.endpoint.metadata
        name = self.service.rpartition(".")[2].removesuffix("Service").lower()
        self.peer = f"the {name} at {self.endpoint.address}"
        # The health package's type stubs know neither its methods nor the asyncio channel.
        self._health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def serving(self, *, timeout_s: float = 1.0) -> bool:
        """Whether the service says SERVING; an error or no answer counts as no."""
        request = health_pb2.HealthCheckRequest(service=self.service)
        try:
            answer = await self._health.Check(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def close(self) -> None:
        await self.channel.close()


class RemoteReasoner(_Remote):
    """`ReasonerStage` over a `ReasonerService`."""

    service = "tte.v1.ReasonerService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = reasoner_pb2_grpc.ReasonerServiceStub(self.channel)

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        request = reasoner_pb2.ReasonRequest(
            inputs=[codec.encode_reason_item(item) for item in items],
            max_tokens=max_tokens,
            omit_deltas=True,
        )
        attempts = Attempts(timeout_s)
        while True:
            try:
                return await self._answer(request, attempts.timeout_s)
            except UnavailableError as error:
                if (pause := attempts.pause_after(error)) is None:
                    raise
            await asyncio.sleep(pause)

    async def _answer(
        self, request: reasoner_pb2.ReasonRequest, timeout_s: float | None
    ) -> tuple[list[Reasoning], Usage]:
        reasonings: list[Reasoning | None] = [None] * len(request.inputs)
        usage = Usage("reason")
        with translated(self.peer):
            call = self._stub.Reason(request, timeout=timeout_s, metadata=self.metadata)
            try:
                async for response in call:
                    if response.HasField("result"):
                        result = response.result
                        if result.input_index < len(reasonings):
                            reasoning = codec.decode_reasoning(result.reasoning)
                            reasonings[result.input_index] = reasoning
                    elif response.HasField("usage"):
                        usage = codec.decode_usage(response.usage)
            finally:
                call.cancel()  # no effect on a call that has ended
        complete = [reasoning for reasoning in reasonings if reasoning is not None]
        if len(complete) < len(reasonings):
            raise InternalError(
                f"{self.peer} answered {len(complete)} of {len(reasonings)} inputs", stage="reason"
            )
        return complete, usage


class RemoteEmbedder(_Remote):
    """`EmbedderStage` over an `EmbedderService`."""

    service = "tte.v1.EmbedderService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = embedder_pb2_grpc.EmbedderServiceStub(self.channel)

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        inputs = [codec.encode_embed_item(item) for item in items]
        request = embedder_pb2.EmbedRequest(inputs=inputs, dimension=dimension)
        with translated(self.peer):
            response = await self._stub.Embed(request, timeout=timeout_s, metadata=self.metadata)
        with _answers(self.peer):
            vectors = [
                codec.decode_vector(vector, f"embeddings[{i}]")
                for i, vector in enumerate(response.embeddings)
            ]
        if len(vectors) != len(items) or len({len(vector) for vector in vectors}) != 1:
            raise InternalError(
                f"{self.peer} answered {len(items)} inputs with {len(vectors)} vectors of "
                f"{sorted({len(vector) for vector in vectors})} elements",
                stage="embed",
            )
        return np.stack(vectors), codec.decode_usage(response.usage)


class RemoteReranker(_Remote):
    """`RerankerStage` over a `RerankerService`."""

    service = "tte.v1.RerankerService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = reranker_pb2_grpc.RerankerServiceStub(self.channel)

    async def rerank(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[np.ndarray, Usage]:
        request = reranker_pb2.RerankRequest(instruction=instruction)
        if isinstance(query, str):
            request.query = query
        else:
            request.query_content.CopyFrom(codec.encode_content(query))
        texts = [one for one in candidates if isinstance(one, str)]
        if len(texts) == len(candidates):
            request.candidates.extend(texts)
        else:
            contents = (Content.of(c) if isinstance(c, str) else c for c in candidates)
            request.candidate_contents.extend(codec.encode_content(c) for c in contents)
        with translated(self.peer):
            response = await self._stub.Rerank(request, timeout=timeout_s, metadata=self.metadata)
        return np.array(response.scores, np.float32), codec.decode_usage(response.usage)


class RemoteIndex(_Remote):
    """`ResumableIndexStage` over an `IndexService`."""

    service = "tte.v1.IndexService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = index_pb2_grpc.IndexServiceStub(self.channel)

    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        request = index_pb2.IndexServiceSearchRequest(
            vector=codec.encode_vector(vector), k=k, embedder_version=embedder_version
        )
        if filter is not None:
            request.filter.CopyFrom(codec.encode_filter(filter))
        with translated(self.peer):
            response = await self._stub.Search(request, timeout=timeout_s, metadata=self.metadata)
        with _answers(self.peer):
            hits = [codec.decode_hit(hit) for hit in response.hits]
        return hits, codec.decode_usage(response.usage)

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        request = index_pb2.UpsertRequest(entries=[codec.encode_entry(e) for e in entries])
        with translated(self.peer):
            response = await self._stub.Upsert(request, timeout=timeout_s, metadata=self.metadata)
        return response.sequence

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        deleted: list[str] = []
        unknown: list[str] = []
        for some in _chunks(ids, MAX_DELETE_IDS):
            request = index_pb2.DeleteRequest(ids=some)
            with translated(self.peer):
                response = await self._stub.Delete(
                    request, timeout=timeout_s, metadata=self.metadata
                )
            deleted += response.deleted_ids
            unknown += response.unknown_ids
        return deleted, unknown

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        found: dict[str, Document] = {}
        for some in _chunks(ids, MAX_BATCH_ITEMS):
            messages = await self._get(some, timeout_s)
            with _answers(self.peer):
                for message in messages:
                    found[message.id] = codec.decode_document(message, "document")
        return [found.get(id) for id in ids]

    async def _get(self, ids: Sequence[str], timeout_s: float | None) -> list:
        request = index_pb2.GetRequest(ids=ids)
        try:
            with translated(self.peer):
                response = await self._stub.Get(request, timeout=timeout_s, metadata=self.metadata)
        except InvalidInputError as error:
            # The media of many documents need not fit into one message; those of one do.
            if error.reason != "RESPONSE_TOO_LARGE" or len(ids) == 1:
                raise
            half = len(ids) // 2
            return await self._get(ids[:half], timeout_s) + await self._get(ids[half:], timeout_s)
        return list(response.documents)

    async def existing(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[str, StoredVersions]:
        found: dict[str, StoredVersions] = {}
        for some in _chunks(ids, MAX_BATCH_ITEMS):
            request = index_pb2.GetRequest(ids=some, omit_media=True)
            with translated(self.peer):
                response = await self._stub.Get(request, timeout=timeout_s, metadata=self.metadata)
            # A server that does not tell the versions makes every document look new.
            with _answers(self.peer):
                for document, made in zip(response.documents, response.versions, strict=False):
                    found[document.id] = StoredVersions(
                        made.content_hash,
                        made.reasoner_version,
                        made.embedder_version,
                        codec.decode_metadata(document.metadata, "document.metadata"),
                    )
        return found

    async def pending(
        self,
        embedder_version: str,
        *,
        limit: int,
        after: str = "",
        restart: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[list[Document], int, int]:
        """(documents to embed next, pending in all, staged in all); see `ListPending`."""
        request = index_pb2.ListPendingRequest(
            embedder_version=embedder_version, limit=limit, after_id=after, restart=restart
        )
        with translated(self.peer):
            response = await self._stub.ListPending(
                request, timeout=timeout_s, metadata=self.metadata
            )
        with _answers(self.peer):
            documents = [codec.decode_document(d, "document") for d in response.documents]
        return documents, response.pending, response.staged

    async def stage(
        self,
        embedder_version: str,
        vectors: Sequence[StagedVector],
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Keeps them durably; returns the stale ids."""
        request = index_pb2.StageVectorsRequest(
            embedder_version=embedder_version,
            vectors=[
                index_pb2.StagedVector(id=id, sequence=sequence, vector=codec.encode_vector(vector))
                for id, sequence, vector in vectors
            ],
        )
        with translated(self.peer):
            response = await self._stub.StageVectors(
                request, timeout=timeout_s, metadata=self.metadata
            )
        return list(response.stale_ids)

    async def promote(self, embedder_version: str, *, timeout_s: float | None = None) -> Promoted:
        """The staged vectors serve when it returns."""
        request = index_pb2.PromoteVectorsRequest(embedder_version=embedder_version)
        with translated(self.peer):
            response = await self._stub.PromoteVectors(
                request, timeout=timeout_s, metadata=self.metadata
            )
        return Promoted(response.sequence, response.documents, response.seconds)

    async def verify(
        self, *, media: bool = True, timeout_s: float | None = None
    ) -> tuple[list[str], int]:
        """(what is wrong with index, database and media; documents compared)."""
        request = index_pb2.VerifyRequest(omit_media=not media)
        with translated(self.peer):
            response = await self._stub.Verify(request, timeout=timeout_s, metadata=self.metadata)
        return list(response.problems), response.documents


@contextmanager
def _answers(peer: str) -> Iterator[None]:
    """A malformed answer is the peer's defect, not the caller's input."""
    try:
        yield
    except InvalidInputError as error:
        raise InternalError(f"{peer} gave a malformed answer: {error.message}") from error


def _chunks(ids: Sequence[str], size: int) -> list[Sequence[str]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
