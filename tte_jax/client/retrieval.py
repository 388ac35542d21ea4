"""The user's client of the gateway: blocking (`Client`) and asyncio (`AsyncClient`).

```python
with Client("127.0.0.1:50060") as client:
    for update in client.search(SearchQuery(Content.of("a smiling cat"), deadline_s=10)):
        print(update.stage, [candidate.id for candidate in update.results])
```
Both raise the types of `tte_jax.errors`. Calls are tried again only while the gateway is
UNAVAILABLE. Use one client for the life of a program: it holds one channel.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, closing
from dataclasses import replace
from types import TracebackType

from tte.v1 import retrieval_pb2, retrieval_pb2_grpc
from tte_jax import codec
from tte_jax.cascade.messages import (
    Degraded,
    IngestOptions,
    IngestUpdate,
    SearchQuery,
    SearchUpdate,
)
from tte_jax.client.channel import Endpoint
from tte_jax.client.retries import Attempts
from tte_jax.client.status import translated
from tte_jax.codec.search import (
    decode_ingest_update,
    decode_update,
    encode_ingest_document,
    encode_ingest_options,
    encode_query,
)
from tte_jax.content import Document
from tte_jax.errors import InternalError, TteError


class AsyncClient:
    """Asyncio client of `RetrievalService`. Make it inside the event loop that uses it."""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self.endpoint = Endpoint.of(endpoint)
        self.channel = self.endpoint.open_async()
        self._stub = retrieval_pb2_grpc.RetrievalServiceStub(self.channel)
        self._metadata = self.endpoint.metadata
        self._peer = f"the gateway at {self.endpoint.address}"

    async def search(self, query: SearchQuery) -> AsyncGenerator[SearchUpdate, None]:
        """Streams rankings as they get better; the last one is final.

        When the call breaks after a ranking came, that ranking is given once more as the final one,
        with the reason in `degraded`. Closing the iterator cancels the search.

        Raises:
          InvalidInputError: empty query, unreadable media, a limit.
          UnavailableError, DeadlineExceededError, OverloadedError: no ranking could be made.
        """
        last: SearchUpdate | None = None
        attempts = Attempts(query.deadline_s)
        while True:
            try:
                with translated(self._peer):
                    call = self._stub.Search(
                        encode_query(query),
                        timeout=attempts.timeout_s,
                        metadata=self._metadata,
                    )
                    try:
                        async for response in call:
                            update = decode_update(response)
                            last = update
                            yield update
                    finally:
                        call.cancel()  # no effect on a call that has ended
                return
            except TteError as error:
                pause = None if last else attempts.pause_after(error)
                if pause is None:
                    yield _broken_off(last, error)
                    return
            await asyncio.sleep(pause)

    async def search_final(self, query: SearchQuery) -> SearchUpdate:
        """The final ranking only; raises as `search`."""
        last = None
        async with aclosing(self.search(query)) as updates:
            async for update in updates:
                last = update
        return _required(last, self._peer)

    async def ingest(
        self,
        documents: AsyncIterable[Document],
        options: IngestOptions | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[IngestUpdate, None]:
        """Stores documents and reports them as they are settled; the last update is final.

        An exception of `documents` ends the call and is raised here. Sending the same documents
        again resumes: what is stored unchanged costs nothing.

        Raises:
          UnavailableError, OverloadedError, DeadlineExceededError: a stage stays away.
          PreconditionError, StorageFullError: the corpus cannot take them.
        """
        failure: list[BaseException] = []

        async def requests() -> AsyncIterator[retrieval_pb2.IngestRequest]:
            yield encode_ingest_options(options or IngestOptions())
            try:
                async for document in documents:
                    yield encode_ingest_document(document)
            except Exception as error:
                failure.append(error)
                call.cancel()

        call = self._stub.Ingest(requests(), timeout=timeout_s, metadata=self._metadata)
        try:
            with translated(self._peer):
                async for response in call:
                    yield decode_ingest_update(response)
        except BaseException as error:
            if failure:
                raise failure[0] from error
            raise
        finally:
            call.cancel()

    async def get_document(
        self, id: str, *, omit_media: bool = False, timeout_s: float | None = 30.0
    ) -> Document:
        """A stored document. Raises `NotFoundError` when the id is unknown."""
        request = retrieval_pb2.GetDocumentRequest(id=id, omit_media=omit_media)
        with translated(self._peer):
            response = await self._stub.GetDocument(
                request, timeout=timeout_s, metadata=self._metadata
            )
        return codec.decode_document(response.document, "document", allow_empty=omit_media)

    async def delete_documents(
        self, ids: Sequence[str], *, timeout_s: float | None = 30.0
    ) -> tuple[list[str], list[str]]:
        """(deleted ids, unknown ids); durable when it returns."""
        request = retrieval_pb2.DeleteDocumentsRequest(ids=ids)
        with translated(self._peer):
            response = await self._stub.DeleteDocuments(
                request, timeout=timeout_s, metadata=self._metadata
            )
        return list(response.deleted_ids), list(response.unknown_ids)

    async def close(self) -> None:
        await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Client:
    """Blocking client of `RetrievalService`; safe to use from several threads."""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self.endpoint = Endpoint.of(endpoint)
        self.channel = self.endpoint.open()
        self._stub = retrieval_pb2_grpc.RetrievalServiceStub(self.channel)
        self._metadata = self.endpoint.metadata
        self._peer = f"the gateway at {self.endpoint.address}"

    def search(self, query: SearchQuery) -> Generator[SearchUpdate, None, None]:
        """As `AsyncClient.search`."""
        last: SearchUpdate | None = None
        attempts = Attempts(query.deadline_s)
        while True:
            try:
                with translated(self._peer):
                    call = self._stub.Search(
                        encode_query(query),
                        timeout=attempts.timeout_s,
                        metadata=self._metadata,
                    )
                    try:
                        for response in call:
                            update = decode_update(response)
                            last = update
                            yield update
                    finally:
                        call.cancel()
                return
            except TteError as error:
                pause = None if last else attempts.pause_after(error)
                if pause is None:
                    yield _broken_off(last, error)
                    return
            time.sleep(pause)

    def search_final(self, query: SearchQuery) -> SearchUpdate:
        """The final ranking only; raises as `search`."""
        last = None
        with closing(self.search(query)) as updates:
            for update in updates:
                last = update
        return _required(last, self._peer)

    def ingest(
        self,
        documents: Iterable[Document],
        options: IngestOptions | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Generator[IngestUpdate, None, None]:
        """As `AsyncClient.ingest`. `documents` is read by another thread."""
        failure: list[BaseException] = []

        def requests() -> Iterator[retrieval_pb2.IngestRequest]:
            yield encode_ingest_options(options or IngestOptions())
            try:
                for document in documents:
                    yield encode_ingest_document(document)
            except Exception as error:
                failure.append(error)
                call.cancel()

        call = self._stub.Ingest(requests(), timeout=timeout_s, metadata=self._metadata)
        try:
            with translated(self._peer):
                for response in call:
                    yield decode_ingest_update(response)
        except TteError as error:
            if failure:
                raise failure[0] from error
            raise
        finally:
            call.cancel()

    def get_document(
        self, id: str, *, omit_media: bool = False, timeout_s: float | None = 30.0
    ) -> Document:
        """A stored document. Raises `NotFoundError` when the id is unknown."""
        request = retrieval_pb2.GetDocumentRequest(id=id, omit_media=omit_media)
        with translated(self._peer):
            response = self._stub.GetDocument(request, timeout=timeout_s, metadata=self._metadata)
        return codec.decode_document(response.document, "document", allow_empty=omit_media)

    def delete_documents(
        self, ids: Sequence[str], *, timeout_s: float | None = 30.0
    ) -> tuple[list[str], list[str]]:
        """(deleted ids, unknown ids); durable when it returns."""
        request = retrieval_pb2.DeleteDocumentsRequest(ids=ids)
        with translated(self._peer):
            response = self._stub.DeleteDocuments(
                request, timeout=timeout_s, metadata=self._metadata
            )
        return list(response.deleted_ids), list(response.unknown_ids)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _broken_off(last: SearchUpdate | None, error: TteError) -> SearchUpdate:
    """The last ranking as the final one; without any, the error itself."""
    if last is None or last.final:
        raise error
    broken = Degraded("gateway", error.reason, f"The search broke off: {error.message}")
    return replace(last, final=True, degraded=(*last.degraded, broken))


def _required(last: SearchUpdate | None, peer: str) -> SearchUpdate:
    if last is None:
        raise InternalError(f"{peer} ended the search without an answer")
    return last
