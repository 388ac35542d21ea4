"""Stages whose answers can be worked out by hand, and an event loop whose time is free.

Texts become letter counts: `embed("abba")` is (2, 2, 0, ...)/sqrt(8). The reasoner answers from a
table. The reranker's P(yes) is the share of the query's words that the candidate has.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from tte_jax.content import Content, Document, Reasoning, Usage
from tte_jax.filters import Filter
from tte_jax.stages import Embedding, EmbedItem, Hit, IndexEntry, ReasonItem, StoredVersions

T = TypeVar("T")


class _NoWait(selectors.DefaultSelector):
    """Moves the loop's clock forward instead of sleeping, once nothing else can run."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("the test waits for something that will never come")
        self.time += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._no_wait = _NoWait()
        super().__init__(self._no_wait)

    def time(self) -> float:
        return self._no_wait.time


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on a virtual clock: an hour of sleeping takes no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def ecr(think: str, answer: str, tokens: int = 4) -> Reasoning:
    return Reasoning(f"<think>{think}</think>\nAnswer: {answer}", think, answer, tokens)


@dataclass
class Behaviour:
    """How a fake misbehaves: `delay` seconds per call, then `errors` one per call, then none."""

    delay: float = 0.0
    errors: list[Exception] = field(default_factory=list)
    broken: Exception | None = None
    calls: int = 0
    running: int = 0
    cancelled: int = 0
    timeouts: list[float | None] = field(default_factory=list)

    async def take(self, timeout_s: float | None) -> None:
        self.calls += 1
        self.timeouts.append(timeout_s)
        self.running += 1
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.errors:
            raise self.errors.pop(0)
        if self.broken is not None:
            raise self.broken


class FakeReasoner(Behaviour):
    """Answers from a table by text (media: their bytes as text); else `<text>: plain`."""

    def __init__(self, table: Mapping[str, Reasoning] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = dict(table or {})
        self.items: list[ReasonItem] = []
        self.max_tokens: list[int] = []
        self.refuse: Callable[[ReasonItem], Exception | None] = lambda item: None
        self.version = "reasoner-1"

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        await self.take(timeout_s)
        for item in items:
            if error := self.refuse(item):
                raise error
        self.items.extend(items)
        self.max_tokens.append(max_tokens)
        answers = []
        for item in items:
            key = text_of(item.content)
            if item.query is not None:
                key = f"{key}|{text_of(item.query)}"
            answers.append(self.table.get(key, ecr(key, "plain")))
        tokens = sum(answer.tokens for answer in answers)
        usage = Usage("reason", 7 * len(items), tokens, 1, 0.25, 0.5, self.version)
        return answers, usage


class UnifiedReasoner(FakeReasoner):
    """Embeds as well, as `FakeEmbedder` does; `unable` says of which texts not.

    `embeds_as` is the version that stands in its vectors.
    """

    def __init__(self, table: Mapping[str, Reasoning] | None = None, **kwargs: Any) -> None:
        super().__init__(table, **kwargs)
        self.version = self.embeds_as = "unified-1"
        self.unable: set[str] = set()
        self.asked_to_embed: list[str] = []

    async def reason_and_embed(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        answers, usage = await self.reason(items, max_tokens=max_tokens, timeout_s=timeout_s)
        texts = [text_of(item.content) for item in items]
        self.asked_to_embed += texts
        spent = Usage("embed", 6, 0, 5, 0.0, 0.125, self.embeds_as, within="reason")
        embeddings = [
            None if text in self.unable else Embedding(letters(answer.answer), spent)
            for text, answer in zip(texts, answers, strict=True)
        ]
        return answers, embeddings, usage


class FakeEmbedder(Behaviour):
    """Letter counts of the ECR's answer, else of the text; L2-normalised, 26 dimensions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items: list[EmbedItem] = []
        self.version = "embedder-1"
        self.refuse: Callable[[EmbedItem], Exception | None] = lambda item: None

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        await self.take(timeout_s)
        for item in items:
            if error := self.refuse(item):
                raise error
        self.items.extend(items)
        rows = []
        for item in items:
            text = item.reasoning.split("Answer: ")[-1] or text_of(item.content)
            rows.append(letters(text))
        return np.stack(rows), Usage("embed", 5 * len(items), model_version=self.version)


class FakeReranker(Behaviour):
    def __init__(self, table: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table
        self.pairs: list[tuple[str, str]] = []
        self.refuse: Callable[[Sequence[str]], None] = lambda candidates: None

    async def rerank(
        self,
        query: str,
        candidates: Sequence[str],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[np.ndarray, Usage]:
        await self.take(timeout_s)
        self.refuse(candidates)
        self.pairs += [(query, candidate) for candidate in candidates]
        words = set(query.split())
        scores = [
            self.table[c] if self.table is not None else len(words & set(c.split())) / len(words)
            for c in candidates
        ]
        usage = Usage("rerank", 11 * len(candidates), cached_tokens=3, model_version="reranker-1")
        return np.array(scores, np.float32), usage


class FakeIndex(Behaviour):
    """Exact search over a dictionary."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.entries: dict[str, IndexEntry] = {}
        self.batches: list[list[str]] = []
        self.sequence = 0
        self.get_behaviour = Behaviour()

    def put(self, id: str, reasoning: Reasoning, content: Content | None = None) -> None:
        document = Document(id, content or Content.of(id), {"n": len(id)}, reasoning)
        self.entries[id] = IndexEntry(document, letters(reasoning.answer or id), "r", "e")

    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        await self.take(timeout_s)
        hits = [
            Hit(id, float(entry.vector @ vector), entry.document.reasoning, entry.document.metadata)
            for id, entry in self.entries.items()
            if filter is None or filter.matches(entry.document.metadata)
        ]
        hits.sort(key=lambda hit: (-hit.cosine, hit.id))
        return hits[:k], Usage("index", compute_s=0.001)

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        await self.take(timeout_s)
        assert len({entry.document.id for entry in entries}) == len(entries)
        self.batches.append([entry.document.id for entry in entries])
        for entry in entries:
            self.entries[entry.document.id] = entry
            self.sequence += 1
        return self.sequence

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        known = [id for id in ids if self.entries.pop(id, None)]
        return known, [id for id in ids if id not in known]

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        await self.get_behaviour.take(timeout_s)
        return [e.document if (e := self.entries.get(id)) else None for id in ids]


class ResumableIndex(FakeIndex):
    async def existing(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[str, StoredVersions]:
        return {
            id: StoredVersions(
                e.document.content.content_hash,
                e.reasoner_version,
                e.embedder_version,
                e.document.metadata,
            )
            for id in ids
            if (e := self.entries.get(id))
        }


class RememberingIndex(ResumableIndex):
    async def reasonings_of(
        self, content_hashes: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[tuple[str, str], Reasoning]:
        return {
            (e.document.content.content_hash, e.reasoner_version): e.document.reasoning
            for e in self.entries.values()
            if e.document.content.content_hash in content_hashes and e.reasoner_version
        }


def text_of(content: Content) -> str:
    return content.text or b" ".join(m.data for m in content.media).decode()


def letters(text: str) -> np.ndarray:
    row = np.zeros(26, np.float32)
    for letter in text.lower():
        if "a" <= letter <= "z":
            row[ord(letter) - ord("a")] += 1
    return row / max(float(np.linalg.norm(row)), 1e-9)


async def collect(items: Any) -> list[Any]:
    return [item async for item in items]
