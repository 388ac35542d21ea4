"""IndexService: the durable corpus and the nearest-neighbour search over it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc

from servers import convert
from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import index_pb2, index_pb2_grpc
from tte_jax import codec, limits
from tte_jax.errors import UnavailableError
from tte_jax.index import CorpusIndex, IndexConfig, LocalIndex

log = logging.getLogger(__name__)

NAME = "tte.v1.IndexService"
CORPUS = "corpus"
MOST_PROBLEMS = 1_000


class IndexServicer(index_pb2_grpc.IndexServiceServicer):
    """The RPCs of `protos/tte/v1/index.proto` over a `LocalIndex`."""

    def __init__(self, path: Path, config: IndexConfig | None = None, *, index: str = "") -> None:
        self._path = path
        self._index = index
        self._config = config
        self._opened: LocalIndex | None = None

    async def open(self) -> None:
        """Open the corpus and bring its index up to date; raises as `CorpusIndex.open`."""
        index = await asyncio.to_thread(
            CorpusIndex.open, self._path, config=self._config, index=self._index
        )
        self._opened = LocalIndex(index)
        stats = index.stats()
        log.info(
            "%s: %d documents at sequence %d, %s search",
            self._path, stats.documents, stats.sequence, stats.searcher,
        )  # fmt: skip

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    @property
    def live_documents(self) -> float:
        """For the metrics; 0 before the corpus is open."""
        return 0.0 if self._opened is None else float(self._opened.index.vectors.documents)

    @property
    def _stage(self) -> LocalIndex:
        if self._opened is None:
            raise UnavailableError("the corpus is being loaded", reason="WARMING_UP")
        return self._opened

    async def Upsert(
        self, request: index_pb2.UpsertRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.UpsertResponse:
        # A request may hold 32 MB of media, too much to copy on the event loop.
        entries = await asyncio.to_thread(convert.upsert_entries, request)
        sequence = await self._stage.upsert(entries, timeout_s=_left(context))
        return index_pb2.UpsertResponse(sequence=sequence)

    async def Delete(
        self, request: index_pb2.DeleteRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.DeleteResponse:
        ids = convert.document_ids(request.ids, limits.MAX_DELETE_IDS)
        deleted, unknown = await self._stage.delete(ids, timeout_s=_left(context))
        return index_pb2.DeleteResponse(deleted_ids=deleted, unknown_ids=unknown)

    async def Search(
        self, request: index_pb2.IndexServiceSearchRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.IndexServiceSearchResponse:
        vector, k, condition = convert.index_search_arguments(request)
        hits, usage = await self._stage.search(
            vector,
            k=k,
            filter=condition,
            embedder_version=request.embedder_version,
            timeout_s=_left(context),
        )
        return convert.index_search_response(hits, usage)

    async def SearchBatch(
        self, request: index_pb2.SearchBatchRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.SearchBatchResponse:
        vectors, k, condition = convert.search_batch_arguments(request)
        found, usage = await self._stage.search_batch(
            vectors,
            k=k,
            filter=condition,
            embedder_version=request.embedder_version,
            ids_only=request.ids_only,
            timeout_s=_left(context),
        )
        if request.ids_only:
            return convert.search_batch_response(found, usage, ids_only=True)
        # Thousands of reasonings, too much to encode on the event loop.
        return await asyncio.to_thread(convert.search_batch_response, found, usage, ids_only=False)

    async def Get(
        self, request: index_pb2.GetRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.GetResponse:
        ids = convert.document_ids(request.ids, limits.MAX_BATCH_ITEMS)
        found = await self._stage.fetch(
            ids,
            omit_media=request.omit_media,
            max_media_bytes=limits.MAX_MESSAGE_BYTES,
            timeout_s=_left(context),
        )
        documents = [None if one is None else one.document for one in found]
        response = await asyncio.to_thread(
            convert.get_response, ids, documents, omit_media=request.omit_media
        )
        response.versions.extend(
            index_pb2.DocumentVersions(
                content_hash=one.versions.content_hash,
                reasoner_version=one.versions.reasoner_version,
                embedder_version=one.versions.embedder_version,
            )
            for one in found
            if one is not None
        )
        return response

    async def FindReasonings(
        self, request: index_pb2.FindReasoningsRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.FindReasoningsResponse:
        hashes = convert.content_hashes(request)
        found = await self._stage.reasonings_of(hashes, timeout_s=_left(context))
        return convert.find_reasonings_response(found)

    async def Stats(
        self, request: index_pb2.StatsRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.StatsResponse:
        stats = await self._stage.stats(timeout_s=_left(context))
        return index_pb2.StatsResponse(
            documents=stats.documents,
            sequence=stats.sequence,
            dimension=stats.dimension,
            embedder_version=stats.embedder_version,
            kind=_kind(stats.searcher),
            generation=stats.generation,
            delta_documents=stats.delta_rows,
            tombstones=stats.dead_rows,
            recall=stats.canary_recall,
            rebuilding=stats.rebuilding,
            snapshot_sequence=stats.snapshot_sequence,
            database_bytes=stats.database_bytes,
            media_bytes=stats.media_bytes,
            query_recall=stats.query_recall,
            checked_queries=stats.checked_queries,
            last_error=stats.last_error,
            staged_embedder_version=stats.staged_embedder_version,
            staged_documents=stats.staged_documents,
        )

    async def Snapshot(
        self, request: index_pb2.SnapshotRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.SnapshotResponse:
        report = await self._stage.snapshot(timeout_s=_left(context))
        return index_pb2.SnapshotResponse(sequence=report.sequence, bytes=report.bytes)

    async def Rebuild(
        self, request: index_pb2.RebuildRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.RebuildResponse:
        report = await self._stage.rebuild(timeout_s=_left(context))
        return index_pb2.RebuildResponse(
            generation=report.generation,
            kind=_kind(report.kind),
            documents=report.rows,
            recall=report.recall,
            seconds=report.seconds,
        )

    async def ListPending(
        self, request: index_pb2.ListPendingRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.ListPendingResponse:
        documents, pending, staged = await self._stage.pending(
            request.embedder_version,
            limit=convert.pending_limit(request),
            after=request.after_id,
            restart=request.restart,
            max_media_bytes=limits.MAX_MESSAGE_BYTES,
            timeout_s=_left(context),
        )
        return await asyncio.to_thread(
            lambda: index_pb2.ListPendingResponse(
                documents=[codec.encode_document(document) for document in documents],
                pending=pending,
                staged=staged,
            )
        )

    async def StageVectors(
        self, request: index_pb2.StageVectorsRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.StageVectorsResponse:
        stale = await self._stage.stage(
            request.embedder_version, convert.staged_vectors(request), timeout_s=_left(context)
        )
        return index_pb2.StageVectorsResponse(stale_ids=stale)

    async def PromoteVectors(
        self, request: index_pb2.PromoteVectorsRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.PromoteVectorsResponse:
        report = await self._stage.promote(request.embedder_version, timeout_s=_left(context))
        return index_pb2.PromoteVectorsResponse(
            sequence=report.sequence, documents=report.documents, seconds=report.seconds
        )

    async def Verify(
        self, request: index_pb2.VerifyRequest, context: grpc.aio.ServicerContext
    ) -> index_pb2.VerifyResponse:
        problems = await self._stage.verify(media=not request.omit_media, timeout_s=_left(context))
        return index_pb2.VerifyResponse(
            problems=problems[:MOST_PROBLEMS], documents=int(self.live_documents)
        )


async def create(settings: Settings) -> Service:
    """The index service over `corpus` in the data directory.

    The corpus is opened while the server warms up; what is wrong with it ends the start then.
    """
    return service_of(IndexServicer(settings.data_dir / CORPUS, index=settings.index))


def service_of(servicer: IndexServicer) -> Service:
    return Service(
        names=(NAME,),
        register=lambda server: index_pb2_grpc.add_IndexServiceServicer_to_server(servicer, server),
        warm=servicer.open,
        close=servicer.close,
        metrics={"documents": lambda: servicer.live_documents},
    )


def _kind(searcher: str) -> str:
    # Which ScaNN configuration it is may change from version to version; the API says only this.
    return searcher.split("-", 1)[0]


def _left(context: grpc.aio.ServicerContext) -> float | None:
    return context.time_remaining()
