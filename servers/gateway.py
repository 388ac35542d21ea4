"""RetrievalService: the cascade over the four stage services."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol, cast

import grpc

from servers import convert
from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax.cascade import Cascade, IngestInput, IngestOptions, Rejected
from tte_jax.client import RemoteEmbedder, RemoteIndex, RemoteReasoner, RemoteReranker
from tte_jax.codec import encode_document
from tte_jax.codec.search import (
    decode_ingest_document,
    decode_ingest_options,
    decode_query,
    encode_ingest_update,
    encode_update,
)
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.limits import MAX_DELETE_IDS

log = logging.getLogger(__name__)

NAME = "tte.v1.RetrievalService"
# Without these there is no ranking at all; without the others it is degraded.
REQUIRED = ("embedder", "index")
WARM_POLL_S = 0.2
POLL_S = 2.0
SLOW_S = 5.0  # a stage that takes longer to say that it serves is down


class RetrievalServicer(retrieval_pb2_grpc.RetrievalServiceServicer):
    """The RPCs of `protos/tte/v1/retrieval.proto` over a `Cascade`."""

    def __init__(self, cascade: Cascade) -> None:
        self._cascade = cascade

    async def Search(
        self, request: retrieval_pb2.SearchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[retrieval_pb2.SearchResponse]:
        query = decode_query(request, deadline_s=_time_left(context))
        async with aclosing(self._cascade.search(query)) as updates:
            async for update in updates:
                yield encode_update(update, scores=query.include.scores)

    async def Ingest(
        self,
        request_iterator: AsyncIterator[retrieval_pb2.IngestRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[retrieval_pb2.IngestResponse]:
        requests = aiter(request_iterator)
        options = IngestOptions()
        first = await anext(requests, None)
        if first is not None and first.HasField("options"):
            options = decode_ingest_options(first.options)
            first = None
        async with (
            aclosing(_documents(first, requests)) as documents,
            aclosing(self._cascade.ingest(documents, options)) as updates,
        ):
            async for update in updates:
                yield encode_ingest_update(update)

    async def GetDocument(
        self, request: retrieval_pb2.GetDocumentRequest, context: grpc.aio.ServicerContext
    ) -> retrieval_pb2.GetDocumentResponse:
        (id,) = convert.document_ids([request.id], 1)
        (document,) = await self._cascade.index.get([id], timeout_s=_time_left(context))
        if document is None:
            raise NotFoundError(
                f"there is no document {id!r}; it was never stored or has been deleted", id=id
            )
        return retrieval_pb2.GetDocumentResponse(
            document=encode_document(document, omit_media=request.omit_media)
        )

    async def DeleteDocuments(
        self, request: retrieval_pb2.DeleteDocumentsRequest, context: grpc.aio.ServicerContext
    ) -> retrieval_pb2.DeleteDocumentsResponse:
        ids = convert.document_ids(request.ids, MAX_DELETE_IDS)
        deleted, unknown = await self._cascade.index.delete(ids, timeout_s=_time_left(context))
        return retrieval_pb2.DeleteDocumentsResponse(deleted_ids=deleted, unknown_ids=unknown)


async def create(settings: Settings) -> Service:
    """A gateway over the stage services at the addresses of the settings.

    It warms up until the embedder and the index serve, and is SERVING while they are.
    """
    reasoner = RemoteReasoner(settings.address_of("reasoner"))
    embedder = RemoteEmbedder(settings.address_of("embedder"))
    index = RemoteIndex(settings.address_of("index"))
    reranker = RemoteReranker(settings.address_of("reranker"))
    backends = {"reasoner": reasoner, "embedder": embedder, "index": index, "reranker": reranker}
    following = None
    if settings.next_embedder_address:
        following = RemoteEmbedder(settings.next_embedder_address)
    cascade = Cascade(reasoner, embedder, index, reranker, next_embedder=following)
    servicer = RetrievalServicer(cascade)
    watch = BackendWatch({**backends, "embedder": CurrentEmbedder(cascade)}, poll_s=POLL_S)

    async def close() -> None:
        every = [*backends.values(), *([following] if following else [])]
        await asyncio.gather(*(backend.close() for backend in every))

    return Service(
        names=(NAME,),
        register=lambda server: retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(
            servicer, server
        ),
        warm=watch.until_ready,
        watch=watch.run,
        close=close,
        metrics=watch.gauges(),
    )


class Backend(Protocol):
    """What the gateway's health needs of a stage's client."""

    async def serving(self, *, timeout_s: float = 1.0) -> bool: ...

    async def disconnected(self) -> None: ...


class CurrentEmbedder:
    """Whichever embedder searches use: it changes when the corpus changes over to another's
    vectors."""

    def __init__(self, cascade: Cascade) -> None:
        self._cascade = cascade

    async def serving(self, *, timeout_s: float = 1.0) -> bool:
        return await self._now.serving(timeout_s=timeout_s)

    async def disconnected(self) -> None:
        await self._now.disconnected()

    @property
    def _now(self) -> Backend:
        return cast(RemoteEmbedder, self._cascade.embedder)


class BackendWatch:
    """Asks the stage services for their health, and the gateway's follows from it.

    They are asked every `poll_s` seconds, more often while a required one is down, and at once
    when a connection breaks: were a killed stage noticed later than it is back, the gateway would
    turn NOT_SERVING in a system that is whole again.
    """

    def __init__(self, backends: Mapping[str, Backend], *, poll_s: float) -> None:
        self._backends = backends
        self._poll_s = poll_s
        self._broken = asyncio.Event()
        self.up = dict.fromkeys(backends, False)

    @property
    def ready(self) -> bool:
        """Whether every required stage served when last asked."""
        return all(self.up[name] for name in REQUIRED)

    async def until_ready(self) -> None:
        """Returns when every required stage serves."""
        missing: list[str] = []
        while True:
            await self._ask()
            if self.ready:
                return
            if missing != (missing := [name for name in REQUIRED if not self.up[name]]):
                log.info("the gateway waits for %s", " and ".join(missing))
            await asyncio.sleep(WARM_POLL_S)

    async def run(self, set_serving: Callable[[bool], Awaitable[None]]) -> None:
        """Reports, for ever, each change of whether the gateway can serve."""
        said = True
        async with asyncio.TaskGroup() as group:
            for backend in self._backends.values():
                group.create_task(self._follow(backend))
            while True:
                with suppress(TimeoutError):
                    pause = self._poll_s if self.ready else WARM_POLL_S
                    await asyncio.wait_for(self._broken.wait(), pause)
                self._broken.clear()
                before = dict(self.up)
                await self._ask()
                for name in (name for name, up in self.up.items() if up != before[name]):
                    log.warning("the %s %s", name, "serves again" if self.up[name] else "is down")
                if self.ready != said:
                    said = self.ready
                    await set_serving(said)

    def gauges(self) -> dict[str, Callable[[], float]]:
        """`<stage>_up` for `/metrics`: 1 or 0."""
        return {f"{name}_up": lambda name=name: float(self.up[name]) for name in self.up}

    async def _follow(self, backend: Backend) -> None:
        while True:
            await backend.disconnected()
            self._broken.set()

    async def _ask(self) -> None:
        answers = await asyncio.gather(*map(self._serves, self._backends))
        self.up = dict(zip(self._backends, answers, strict=True))

    async def _serves(self, name: str) -> bool:
        backend = self._backends[name]
        # One that served a moment ago is asked twice: it may only be slow.
        return await backend.serving() or (
            self.up[name] and await backend.serving(timeout_s=SLOW_S)
        )


async def _documents(
    first: retrieval_pb2.IngestRequest | None,
    requests: AsyncIterator[retrieval_pb2.IngestRequest],
) -> AsyncGenerator[IngestInput, None]:
    """The stream's documents; a bad one takes its place as `Rejected` and fails alone."""
    if first is not None:
        yield _document(first)
    async for request in requests:
        yield _document(request)


def _document(request: retrieval_pb2.IngestRequest) -> IngestInput:
    if request.HasField("options"):
        raise InvalidInputError(
            "options came after the first message of the stream; send them first", field="options"
        )
    try:
        return decode_ingest_document(request.document)
    except InvalidInputError as error:
        return Rejected(request.document.id, error)


def _time_left(context: Any) -> float | None:
    """Seconds until the caller's deadline; None when it set none."""
    return context.time_remaining()
