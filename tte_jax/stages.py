"""The Protocols between the cascade and its four stages.

The cascade (`tte_jax.cascade`) sees only these. `tte_jax.client` implements them over gRPC, and
`tte_jax.local` over the role objects in one process; the gateway and the evaluation therefore run
the same cascade. Every method raises the types of `tte_jax.errors` and honours `timeout_s`
(`None` = no limit) by raising `DeadlineExceededError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from tte_jax import limits
from tte_jax.content import (
    NO_REASONING,
    Content,
    Document,
    Metadata,
    Reasoning,
    Side,
    Task,
    Usage,
)
from tte_jax.errors import InvalidInputError
from tte_jax.filters import Filter


@dataclass(frozen=True)
class ReasonItem:
    """One input of the reasoner.

    Attributes:
      content: what to reason about. For `Task.REWRITE`, the candidate.
      side: query or document; picks the prompt's wording.
      instruction: the caller's task description; empty = the prompt's own.
      task: forced task; `None` = chosen from content and side.
      query: `Task.REWRITE` only: the query in whose light the candidate is rewritten.
      query_reasoning: `Task.REWRITE` only: the query's ECR text.
      candidate_reasoning: `Task.REWRITE` only: the candidate's ECR text.
    """

    content: Content
    side: Side
    instruction: str = ""
    task: Task | None = None
    query: Content | None = None
    query_reasoning: str = ""
    candidate_reasoning: str = ""

    @property
    def background(self) -> bool:
        """Whether no query waits for it; a rewrite is of a document, but its query waits."""
        return self.side is Side.DOCUMENT and self.task is not Task.REWRITE


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and what ends a text besides the model's own end.

    Attributes:
      temperature: 0 = greedy; at most `limits.MAX_TEMPERATURE`.
      top_p: draws among the likeliest tokens that together have this probability, in (0, 1].
      seed: equal seeds give equal texts.
      stop: a text ends before the first of these; at most `limits.MAX_STOPS`.

    Raises:
      InvalidInputError: a value is out of range; `field` names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= limits.MAX_TEMPERATURE:
            raise InvalidInputError(
                f"sampling.temperature is {self.temperature}: expected 0 (greedy) to "
                f"{limits.MAX_TEMPERATURE:g}",
                field="sampling.temperature",
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidInputError(
                f"sampling.top_p is {self.top_p}: expected above 0 and at most 1",
                field="sampling.top_p",
            )
        sizes = [len(text) for text in self.stop]
        if len(sizes) > limits.MAX_STOPS or not all(
            0 < size <= limits.MAX_STOP_CHARS for size in sizes
        ):
            raise InvalidInputError(
                f"sampling.stop: expected at most {limits.MAX_STOPS} texts of 1 to "
                f"{limits.MAX_STOP_CHARS} characters, got {len(sizes)} of {sizes}",
                field="sampling.stop",
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class EmbedItem:
    """One input of the embedder: content, its ECR text (may be empty), side and instruction."""

    content: Content
    side: Side
    reasoning: str = ""
    instruction: str = ""

    @property
    def background(self) -> bool:
        """Whether no query waits for it."""
        return self.side is Side.DOCUMENT


@dataclass(frozen=True)
class IndexEntry:
    """A document with its embedding ([D] float32, L2-normalised) and the versions behind it."""

    document: Document
    vector: np.ndarray
    reasoner_version: str = ""
    embedder_version: str = ""


@dataclass(frozen=True)
class Order:
    """What a listwise reranker answers: the candidates, best first.

    Attributes:
      indices: every position of the request's candidates once.
      ranked: how many of them, from the first, the model ordered; the others follow as they came.
    """

    indices: tuple[int, ...]
    ranked: int


@dataclass(frozen=True)
class Hit:
    """One first-stage result."""

    id: str
    cosine: float
    reasoning: Reasoning = NO_REASONING
    metadata: Metadata = field(default_factory=dict)


class StoredVersions(NamedTuple):
    """What a stored document was made of; a re-ingest skips it when all of this is unchanged.

    `metadata` is `None` where the index cannot tell; such a document is ingested again.
    """

    content_hash: str
    reasoner_version: str
    embedder_version: str
    metadata: Metadata | None = None


class StagedVector(NamedTuple):
    """A document's vector of the next embedder ([D] float32, L2-normalised), made from its state at
    `sequence`."""

    id: str
    sequence: int
    vector: np.ndarray


class Promoted(NamedTuple):
    """A finished change of embedder: the last write's number, documents, what it took."""

    sequence: int
    documents: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Embedding:
    """A vector ([D] float32, L2-normalised) and what it cost; `usage` has the model's version."""

    vector: np.ndarray
    usage: Usage


class ReasonerStage(Protocol):
    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        """One ECR per item, in order; at most `max_tokens` new tokens each (hard limit)."""
        ...


@runtime_checkable
class EmbeddingReasonerStage(Protocol):
    """A reasoner that may hold a unified model, which embeds what it has just reasoned about."""

    async def reason_and_embed(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        """As `reason`, and for each item the embedding of its content with this ECR: what an
        embedder of that version answers. None where the reasoner cannot give it."""
        ...


class EmbedderStage(Protocol):
    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        """[B, D] float32, L2-normalised; `dimension` > 0 truncates and normalises again."""
        ...


class RerankerStage(Protocol):
    async def rerank(
        self,
        query: str,
        candidates: Sequence[str],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[np.ndarray, Usage]:
        """[N] float32 P(yes) of each candidate text for the query text, in the given order."""
        ...


class IndexStage(Protocol):
    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        """At most k live documents by falling cosine; ties by document id.

        `embedder_version` is that of the vector; another one than the corpus's is a
        `PreconditionError` with reason `EMBEDDER_MISMATCH`; "" = not checked.
        """
        ...

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        """Store durably, all or nothing; returns the sequence number of the last entry."""
        ...

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        """(deleted ids, unknown ids); durable when it returns."""
        ...

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        """The documents with their media, `None` where the id is unknown."""
        ...


@runtime_checkable
class ResumableIndexStage(Protocol):
    """An index that can tell what it holds without reading media; makes ingests resumable."""

    async def existing(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[str, StoredVersions]:
        """What the documents that exist were made of; unknown ids are left out."""
        ...


@runtime_checkable
class RememberingIndexStage(Protocol):
    """An index that knows the ECRs of contents; an ingest then reasons once about each."""

    async def reasonings_of(
        self, content_hashes: Sequence[str], *, timeout_s: float | None = None
    ) -> Mapping[tuple[str, str], Reasoning]:
        """(content hash, reasoner version) → ECR, of those that documents have."""
        ...


class ReembeddableIndexStage(Protocol):
    """An index that takes another embedder's vectors beside those that serve."""

    async def pending(
        self,
        embedder_version: str,
        *,
        limit: int,
        after: str = "",
        restart: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[list[Document], int, int]:
        """(at most `limit` documents of greater id than `after` without such a vector, how many
        there are in all, how many have theirs). The first call begins the re-embedding."""
        ...

    async def stage(
        self,
        embedder_version: str,
        vectors: Sequence[StagedVector],
        *,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Keep them durably; returns the ids of documents that have changed or gone since."""
        ...

    async def promote(self, embedder_version: str, *, timeout_s: float | None = None) -> Promoted:
        """Serve the staged vectors; `PreconditionError` with reason `REEMBEDDING_INCOMPLETE` while
        documents are pending."""
        ...
