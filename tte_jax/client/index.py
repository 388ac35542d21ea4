"""Clients of the index service: the cascade's stage over gRPC, and a blocking one for searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np

from tte.v1 import index_pb2, index_pb2_grpc
from tte_jax import codec
from tte_jax.client.channel import Endpoint
from tte_jax.client.remote import Remote, answers
from tte_jax.client.status import translated
from tte_jax.content import Document, Reasoning, Usage
from tte_jax.errors import InternalError, InvalidInputError, UnsupportedError
from tte_jax.filters import Filter
from tte_jax.limits import (
    MAX_BATCH_ITEMS,
    MAX_DELETE_IDS,
    MAX_SEARCH_HITS,
    MAX_SEARCH_VECTORS,
)
from tte_jax.stages import Hit, IndexEntry, Promoted, StagedVector, StoredVersions


class RemoteIndex(Remote):
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
        request = _search_request(vector, k, filter, embedder_version)
        with translated(self.peer):
            response = await self._stub.Search(request, timeout=timeout_s, metadata=self.metadata)
        with answers(self.peer):
            hits = [codec.decode_hit(hit) for hit in response.hits]
        return hits, codec.decode_usage(response.usage)

    async def search_batch(
        self,
        vectors: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        ids_only: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[list[list[Hit]], Usage]:
        """What `search` answers to each row of `vectors` [Q, D], in order.

        Any number of them: they travel in calls of the size that the service takes.

        Args:
          ids_only: hits come without reasoning and metadata.
          timeout_s: for each call.
        """
        batch = _SearchBatch(vectors, k, filter, embedder_version, ids_only)
        while (request := batch.request()) is not None:
            try:
                with translated(self.peer):
                    response = await self._stub.SearchBatch(
                        request, timeout=timeout_s, metadata=self.metadata
                    )
            except InvalidInputError as error:
                batch.refused(error)
            else:
                with answers(self.peer):
                    batch.answered(self.peer, response)
        return batch.found, batch.usage

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
            with answers(self.peer):
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
            with answers(self.peer):
                for document, made in zip(response.documents, response.versions, strict=False):
                    found[document.id] = StoredVersions(
                        made.content_hash,
                        made.reasoner_version,
                        made.embedder_version,
                        codec.decode_metadata(document.metadata, "document.metadata"),
                    )
        return found

    async def reasonings_of(
        self, content_hashes: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[tuple[str, str], Reasoning]:
        """(content hash, reasoner version) → ECR; nothing from a service that cannot tell."""
        found: dict[tuple[str, str], Reasoning] = {}
        for some in _chunks(content_hashes, MAX_BATCH_ITEMS):
            request = index_pb2.FindReasoningsRequest(content_hashes=some)
            try:
                with translated(self.peer):
                    response = await self._stub.FindReasonings(
                        request, timeout=timeout_s, metadata=self.metadata
                    )
            except UnsupportedError:
                return {}
            for one in response.reasonings:
                reasoning = codec.decode_reasoning(one.reasoning)
                found[one.content_hash, one.reasoner_version] = reasoning
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
        with answers(self.peer):
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


class IndexClient:
    """Blocking client of an `IndexService`'s searches; safe to use from several threads."""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self.endpoint = Endpoint.of(endpoint)
        self.channel = self.endpoint.open()
        self._stub = index_pb2_grpc.IndexServiceStub(self.channel)
        self._metadata = self.endpoint.metadata
        self._peer = f"the index at {self.endpoint.address}"

    def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        """As `RemoteIndex.search`."""
        request = _search_request(vector, k, filter, embedder_version)
        with translated(self._peer):
            response = self._stub.Search(request, timeout=timeout_s, metadata=self._metadata)
        with answers(self._peer):
            hits = [codec.decode_hit(hit) for hit in response.hits]
        return hits, codec.decode_usage(response.usage)

    def search_batch(
        self,
        vectors: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        ids_only: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[list[list[Hit]], Usage]:
        """As `RemoteIndex.search_batch`."""
        batch = _SearchBatch(vectors, k, filter, embedder_version, ids_only)
        while (request := batch.request()) is not None:
            try:
                with translated(self._peer):
                    response = self._stub.SearchBatch(
                        request, timeout=timeout_s, metadata=self._metadata
                    )
            except InvalidInputError as error:
                batch.refused(error)
            else:
                with answers(self._peer):
                    batch.answered(self._peer, response)
        return batch.found, batch.usage

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> IndexClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _SearchBatch:
    """Any number of vectors as calls of the size that the service takes, one after the other.

    Attributes:
      found: what has been answered.
      usage: the sum over the calls.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        k: int,
        filter: Filter | None,
        embedder_version: str,
        ids_only: bool,
    ) -> None:
        vectors = np.asarray(vectors)
        if vectors.ndim != 2:
            raise InvalidInputError(
                f"the query vectors must be [Q, D], got shape {list(vectors.shape)}",
                field="vectors",
            )
        self._vectors = vectors
        self._like = index_pb2.SearchBatchRequest(
            k=k, embedder_version=embedder_version, ids_only=ids_only
        )
        if filter is not None:
            self._like.filter.CopyFrom(codec.encode_filter(filter))
        self._size = max(1, min(MAX_SEARCH_VECTORS, MAX_SEARCH_HITS // max(k, 1)))
        self.found: list[list[Hit]] = []
        self.usage = Usage("index")

    def request(self) -> index_pb2.SearchBatchRequest | None:
        """The next call; `None` when every vector has been answered."""
        start = len(self.found)
        if start >= len(self._vectors):
            return None
        request = index_pb2.SearchBatchRequest()
        request.CopyFrom(self._like)
        for vector in self._vectors[start : start + self._size]:
            request.vectors.append(codec.encode_vector(vector))
        return request

    def answered(self, peer: str, response: index_pb2.SearchBatchResponse) -> None:
        asked = min(self._size, len(self._vectors) - len(self.found))
        if len(response.results) != asked:
            raise InternalError(
                f"{peer} answered {asked} vectors with {len(response.results)} results",
                stage="index",
            )
        for result in response.results:
            self.found.append([codec.decode_hit(hit) for hit in result.hits])
        spent = codec.decode_usage(response.usage)
        self.usage = Usage(
            stage=spent.stage,
            queue_s=self.usage.queue_s + spent.queue_s,
            compute_s=self.usage.compute_s + spent.compute_s,
        )

    def refused(self, error: InvalidInputError) -> None:
        """Asks for less at a time when the hits did not fit into a message; else raises."""
        if error.reason != "RESPONSE_TOO_LARGE" or self._size == 1:
            raise error
        self._size = (min(self._size, len(self._vectors) - len(self.found)) + 1) // 2


def _search_request(
    vector: np.ndarray, k: int, filter: Filter | None, embedder_version: str
) -> index_pb2.IndexServiceSearchRequest:
    request = index_pb2.IndexServiceSearchRequest(
        vector=codec.encode_vector(vector), k=k, embedder_version=embedder_version
    )
    if filter is not None:
        request.filter.CopyFrom(codec.encode_filter(filter))
    return request


def _chunks(ids: Sequence[str], size: int) -> list[Sequence[str]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
