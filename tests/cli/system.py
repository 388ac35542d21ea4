"""A whole system in one thread: the real gateway, the real index, models with known answers."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers import convert, gateway, index
from servers.runtime import Service, serve
from servers.settings import Settings
from tests.cascade.fakes import FakeEmbedder, FakeReasoner, FakeReranker
from tte.v1 import (
    embedder_pb2,
    embedder_pb2_grpc,
    model_pb2,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax.content import Content, MediaKind, Reasoning, Usage
from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.image import decode_image
from tte_jax.preprocess.pages import render_page
from tte_jax.stages import ReasonItem

NAMES = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green", (255, 255, 0): "yellow"}


def seen(content: Content) -> Content:
    """A content as words: a picture's are the name of its first pixel's colour."""
    words = [content.text] if content.text else []
    for media in content.media:
        if media.kind is MediaKind.VIDEO:
            words.insert(0, "film")
            continue
        page = media.kind is MediaKind.PAGE
        image = render_page(media.data, media.page) if page else decode_image(media.data)
        pixel = image.getpixel((0, 0))
        words.insert(0, NAMES.get(pixel, "grey"))  # type: ignore[arg-type]
    return Content.of(" ".join(words))


class ColourReasoner(FakeReasoner):
    """Names colours; "poison" cannot be reasoned about."""

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        if any("poison" in item.content.text for item in items):
            raise InvalidInputError("the text is poison", field="content.parts[0].text")
        read = [dataclasses.replace(item, content=seen(item.content)) for item in items]
        answers, usage = await super().reason(read, max_tokens=max_tokens, timeout_s=timeout_s)
        named = [
            dataclasses.replace(a, text=f"<think>{a.think}</think>\nAnswer: {a.think}",
                                answer=a.think)
            for a in answers
        ]  # fmt: skip
        return named, usage


class _Reasoner(reasoner_pb2_grpc.ReasonerServiceServicer):
    def __init__(self) -> None:
        self.stage = ColourReasoner()

    async def Reason(self, request: reasoner_pb2.ReasonRequest, context: Any) -> Any:
        items, max_tokens, _ = convert.reason_arguments(request)
        reasonings, usage = await self.stage.reason(items, max_tokens=max_tokens)
        for number, reasoning in enumerate(reasonings):
            yield convert.reason_result(number, reasoning)
        yield convert.reason_usage(usage)

    async def Info(self, request: Any, context: Any) -> reasoner_pb2.ReasonerServiceInfoResponse:
        return reasoner_pb2.ReasonerServiceInfoResponse(model=_info("reasoner-1"))


class _Embedder(embedder_pb2_grpc.EmbedderServiceServicer):
    def __init__(self) -> None:
        self.stage = FakeEmbedder()

    async def Embed(self, request: Any, context: Any) -> embedder_pb2.EmbedResponse:
        items, dimension = convert.embed_arguments(request)
        return convert.embed_response(*await self.stage.embed(items, dimension=dimension))

    async def Info(self, request: Any, context: Any) -> embedder_pb2.EmbedderServiceInfoResponse:
        return embedder_pb2.EmbedderServiceInfoResponse(model=_info("embedder-1"))


class _Reranker(reranker_pb2_grpc.RerankerServiceServicer):
    def __init__(self) -> None:
        self.stage = FakeReranker()

    async def Rerank(self, request: Any, context: Any) -> reranker_pb2.RerankResponse:
        query, candidates, instruction = convert.rerank_arguments(request)
        answer = await self.stage.rerank(query, candidates, instruction=instruction)
        return convert.rerank_response(*answer)

    async def Info(self, request: Any, context: Any) -> reranker_pb2.RerankerServiceInfoResponse:
        return reranker_pb2.RerankerServiceInfoResponse(model=_info("reranker-1"))


def _info(version: str) -> model_pb2.ModelInfo:
    return model_pb2.ModelInfo(model_name="counting", model_version=version, dimension=26)


async def _nothing() -> None:
    return None


def _fake(name: str, register: Any, servicer: Any) -> Any:
    async def create(settings: Settings) -> Service:
        return Service(
            names=(name,),
            register=lambda server: register(servicer, server),
            warm=_nothing,
            close=_nothing,
        )

    return create


class System:
    """Starts with the object; `addresses` are those of the running services.

    Attributes:
      reranker: the fake behind the reranker, to make it fail.
      embedder: the fake behind the embedder, to make it another one.
    """

    def __init__(self, data_dir: Path) -> None:
        self.addresses: dict[str, str] = {}
        self._data_dir = data_dir
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self.reranker = FakeReranker()
        self.embedder = FakeEmbedder()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        if not self._ready.wait(60) or self._error:
            raise RuntimeError("the test system did not start") from self._error

    def stop(self) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _work(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        reranker = _Reranker()
        reranker.stage = self.reranker
        embedder = _Embedder()
        embedder.stage = self.embedder
        creators = {
            "reasoner": _fake(
                "tte.v1.ReasonerService",
                reasoner_pb2_grpc.add_ReasonerServiceServicer_to_server,
                _Reasoner(),
            ),
            "embedder": _fake(
                "tte.v1.EmbedderService",
                embedder_pb2_grpc.add_EmbedderServiceServicer_to_server,
                embedder,
            ),
            "reranker": _fake(
                "tte.v1.RerankerService",
                reranker_pb2_grpc.add_RerankerServiceServicer_to_server,
                reranker,
            ),
            "index": index.create,
        }
        tasks = [await self._start(name, create) for name, create in creators.items()]
        found = {f"{name}_address": address for name, address in self.addresses.items()}
        tasks.append(await self._start("gateway", gateway.create, **found))
        self._ready.set()
        await asyncio.gather(*tasks)

    async def _start(self, name: str, create: Any, **found: str) -> asyncio.Task[None]:
        assert self._stop is not None
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        settings = Settings(service=name, port=0, grace_s=1.0, data_dir=self._data_dir, **found)
        task = asyncio.create_task(serve(settings, create, stop=self._stop, ready=port.set_result))
        await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
        if not port.done():
            await task
        self.addresses[name] = f"127.0.0.1:{port.result()}"
        return task
