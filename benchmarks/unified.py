"""What it saves that a unified model embeds in the slots in which it has reasoned.

    python -m benchmarks.unified

Two arms take turns in one run, over the same models, index and questions: `slots`, where the
reasoner's vectors are taken, and `embedder`, where every embedding is a call of the embedder, as it
was before. Once in one process, and once through gateways over running services; each arm has a
gateway of its own in front of the same services. Both arms get the same pictures in files of
different bytes, so that neither profits from features that the other one's query left cached.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tyro
from PIL import Image, PngImagePlugin

from benchmarks import environment
from benchmarks.queries import KINDS, Question, draw
from benchmarks.search import spread
from servers.errors import ErrorInterceptor
from servers.gateway import RetrievalServicer
from servers.runtime import SERVER_OPTIONS
from tte.v1 import retrieval_pb2_grpc
from tte_jax.builtin import models, openmoji
from tte_jax.cascade import Cascade, IngestOptions, IngestUpdate, SearchQuery, SearchUpdate
from tte_jax.cli import launch
from tte_jax.cli.output import Output
from tte_jax.client import (
    AsyncClient,
    RemoteEmbedder,
    RemoteIndex,
    RemoteReasoner,
    RemoteReranker,
)
from tte_jax.content import Content, Document, Media, Reasoning, Usage
from tte_jax.embedder import Embedder
from tte_jax.engine.executables import enable_compile_cache
from tte_jax.index.corpus_index import CorpusIndex
from tte_jax.index.local_index import LocalIndex
from tte_jax.local import LocalEmbedder, LocalReasoner, LocalReranker
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import ReasonerStage, ReasonItem

SLOTS, EMBEDDER = ARMS = ("slots", "embedder")
PARITY = 1e-4
"""How far the two arms' cosines may be apart; both are float32."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      queries: questions of each kind that both arms are asked.
      warm: questions asked of each arm before the measured ones.
      documents: pictures of one ingest.
      ingests: how often each arm ingests them.
      compile_cache: compiled programs; those of `tte demo` unless named.
      start_timeout: seconds that the services get to start.
      out: the result.
      seed: of the questions.
    """

    queries: int = 30
    warm: int = 6
    documents: int = 96
    ingests: int = 3
    compile_cache: Path = Path(".tte/demo/compile-cache")
    start_timeout: float = 900.0
    out: Path = Path("benchmarks/results/unified.json")
    seed: int = 0


class ReasonOnly:
    """A reasoner as it was: it has no way to be asked for vectors."""

    def __init__(self, inner: ReasonerStage) -> None:
        self._inner = inner

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        return await self._inner.reason(items, max_tokens=max_tokens, timeout_s=timeout_s)


@dataclass(frozen=True)
class Arm:
    """A way in: `Cascade` and `AsyncClient` have these two in common."""

    search: Callable[[SearchQuery], AsyncGenerator[SearchUpdate, None]]
    ingest: Callable[[AsyncIterator[Document], IngestOptions], AsyncGenerator[IngestUpdate, None]]


@dataclass(frozen=True)
class Sample:
    kind: str
    first_s: float
    final_s: float
    last: SearchUpdate


@asynccontextmanager
async def in_process(config: Config) -> AsyncIterator[dict[str, Arm]]:
    """Both arms over role objects and an index of this process."""
    enable_compile_cache(config.compile_cache)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        reasoner, embedder, reranker = (
            stack.enter_context(Reasoner.from_pretrained(models.path_of(models.REASONER))),
            stack.enter_context(Embedder.from_pretrained(models.path_of(models.EMBEDDER))),
            stack.enter_context(Reranker.from_pretrained(models.path_of(models.RERANKER))),
        )
        for role in (reasoner, embedder, reranker):
            await asyncio.to_thread(role.warmup)
        index = LocalIndex(await asyncio.to_thread(CorpusIndex.open, Path(folder)))
        stack.push_async_callback(index.close)
        reason = LocalReasoner(reasoner)
        others = (LocalEmbedder(embedder), index, LocalReranker(reranker))
        yield {
            SLOTS: _arm(Cascade(reason, *others)),
            EMBEDDER: _arm(Cascade(ReasonOnly(reason), *others)),
        }


@asynccontextmanager
async def through_gateways(config: Config) -> AsyncIterator[dict[str, Arm]]:
    """Both arms as clients of gateways of their own, over the services as they are served."""
    flags = [
        "--port=0",
        f"--compile-cache={config.compile_cache.absolute()}",
        *launch.model_flags(()),
    ]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = launch.services(folder, wait_s=config.start_timeout, out=Output(), flags=flags)
        at = stack.enter_context(started).address
        reasoner, embedder = RemoteReasoner(at("reasoner")), RemoteEmbedder(at("embedder"))
        index, reranker = RemoteIndex(at("index")), RemoteReranker(at("reranker"))
        for remote in (reasoner, embedder, index, reranker):
            stack.push_async_callback(remote.close)
        arms: dict[str, Arm] = {}
        for arm, stage in ((SLOTS, reasoner), (EMBEDDER, ReasonOnly(reasoner))):
            servicer = RetrievalServicer(Cascade(stage, embedder, index, reranker))
            server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=SERVER_OPTIONS)
            retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 1.0)
            client = AsyncClient(f"127.0.0.1:{port}")
            stack.push_async_callback(client.close)
            arms[arm] = _arm(client)
        yield arms


def _arm(way: Cascade | AsyncClient) -> Arm:
    return Arm(way.search, way.ingest)


async def measure(arms: dict[str, Arm], config: Config) -> dict[str, Any]:
    """Ingests, then searches, the arms taking turns and each beginning every other time."""
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    documents = list(islice(openmoji.documents(), config.documents))
    # The first round tells the cascades which models answer, and is not counted.
    for number in range(config.ingests + 1):
        for arm in _turn(number):
            name = f"{arm}-{number}"
            given = documents if number else documents[:4]
            seconds, last = await _ingest(arms[arm], given, name)
            if last.stored != len(given):
                raise RuntimeError(f"{last.failed} of {len(given)} documents failed in {name}")
            if number:
                rates[arm].append(len(given) / seconds)
                if ("reason" in {u.within for u in last.usage}) != (arm == SLOTS):
                    raise RuntimeError(f"the ingest {name} did not go the way of its arm")
    samples: dict[str, list[Sample]] = {arm: [] for arm in ARMS}
    questions = draw(config.warm + len(KINDS) * config.queries, seed=config.seed)
    apart = 0.0
    for number, question in enumerate(questions):
        pair: dict[str, Sample] = {}
        for arm in _turn(number):
            pair[arm] = await _ask(arms[arm], question, f"{arm}-{number}")
        apart = max(apart, _apart(*(pair[arm].last for arm in ARMS)))
        if number >= config.warm:
            for arm in ARMS:
                _check(pair[arm], arm)
                samples[arm].append(pair[arm])
    if apart > PARITY:
        raise RuntimeError(f"the arms' cosines are {apart:.2g} apart; expected {PARITY:g} at most")
    return {
        "largest_difference_of_cosines": apart,
        "ingest": {
            arm: {"documents_per_s": [round(r, 2) for r in rates[arm]],
                  "median": round(float(np.median(rates[arm])), 2)}
            for arm in ARMS
        },
        "search": {kind: _compare(kind, samples) for kind in (*KINDS, "all")},
    }  # fmt: skip


def _turn(number: int) -> tuple[str, str]:
    return (SLOTS, EMBEDDER) if number % 2 else (EMBEDDER, SLOTS)


async def _ingest(arm: Arm, documents: Sequence[Document], name: str) -> tuple[float, IngestUpdate]:
    async def stream() -> AsyncIterator[Document]:
        for document in given:
            yield document

    given = [
        replace(d, id=f"{name}:{d.id}", content=marked(d.content, f"{name}:{d.id}"))
        for d in documents
    ]
    started, last = time.perf_counter(), None
    async for update in arm.ingest(stream(), IngestOptions()):
        last = update
    if last is None:
        raise RuntimeError(f"the ingest {name} gave no answer")
    return time.perf_counter() - started, last


async def _ask(arm: Arm, question: Question, mark: str) -> Sample:
    query = SearchQuery(marked(question.content, mark))
    started = time.perf_counter()
    times: list[float] = []
    last: SearchUpdate | None = None
    async for update in arm.search(query):
        times.append(time.perf_counter() - started)
        last = update
    if last is None:
        raise RuntimeError("a search gave no answer")
    return Sample(question.kind, times[0], times[-1], last)


def marked(content: Content, mark: str) -> Content:
    """The same content in other bytes: its pictures are PNGs with a comment in them."""

    def other(media: Media) -> Media:
        about = PngImagePlugin.PngInfo()
        about.add_text("Comment", mark)
        out = io.BytesIO()
        Image.open(io.BytesIO(media.data)).save(out, "PNG", pnginfo=about)
        return replace(media, data=out.getvalue())

    return Content(tuple(other(p) if isinstance(p, Media) else p for p in content.parts))


def _check(sample: Sample, arm: str) -> None:
    """Raises when a search was degraded or did not go the way of its arm."""
    ways = [u.within for u in sample.last.usage if u.stage == "embed"]
    if sample.last.degraded or ways != (["reason"] if arm == SLOTS else [""]):
        raise RuntimeError(f"a search of {arm} embedded in {ways}, {sample.last.degraded}")


def _apart(one: SearchUpdate, other: SearchUpdate) -> float:
    """Largest difference of the cosines of the candidates that both found."""
    first, second = ({c.id: c.cosine for c in u.results} for u in (one, other))
    return max((abs(first[i] - second[i]) for i in first.keys() & second.keys()), default=0.0)


def _compare(kind: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    chosen = {arm: [s for s in samples[arm] if kind in (s.kind, "all")] for arm in ARMS}
    for arm in ARMS:
        found[arm] = {
            "first_ranking": spread([s.first_s for s in chosen[arm]]),
            "final": spread([s.final_s for s in chosen[arm]]),
            "tokens_reasoned": round(
                float(np.mean([s.last.query_reasoning.tokens for s in chosen[arm]])), 1
            ),
        }
    saved = [
        other.first_s - one.first_s
        for one, other in zip(chosen[SLOTS], chosen[EMBEDDER], strict=True)
    ]
    found["saved_to_first_ranking_p50_ms"] = round(1000 * float(np.median(saved)), 2)
    return found


async def run(config: Config) -> dict[str, Any]:
    """Everything that the result holds except the environment."""
    before = environment.foreign_load()
    found: dict[str, Any] = {}
    for name, way in (("in_process", in_process), ("gateway", through_gateways)):
        async with way(config) as arms:
            found[name] = await measure(arms, config)
        for kind, figures in found[name]["search"].items():
            p50 = [figures[arm]["first_ranking"]["p50_ms"] for arm in ARMS]
            print(f"{name}, {kind}: first ranking p50 {p50[0]} ms, with the embedder {p50[1]} ms")
        rates = [found[name]["ingest"][arm]["median"] for arm in ARMS]
        print(f"{name}: {rates[0]} documents/s, with the embedder {rates[1]}", flush=True)
    after = environment.foreign_load()
    load = {"before": before, "after": after}
    return {"noisy": environment.noisy(before, after), "foreign_load": load, **found}


def main(config: Config) -> int:
    about = environment.describe("benchmarks.unified")
    result = about | asyncio.run(run(config))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
