"""What travels through the cascade: contents, reasonings, candidates, budgets and usage.

Plain, immutable values with no JAX, gRPC or file access in them, so that every layer (roles,
index, cascade, servers, client) can share them without importing each other.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

MetadataValue = str | int | float | bool
Metadata = Mapping[str, MetadataValue]


class Side(enum.StrEnum):
    """Which side of retrieval an input stands on; prompts are worded differently per side."""

    QUERY = "query"
    DOCUMENT = "document"


class Task(enum.StrEnum):
    """What the reasoner is asked to do; chosen from the content and the side when not given."""

    TEXT = "text"  # a text query: say what the wanted item shows
    IMAGE = "image"  # an image: describe it, then name it
    COMPOSED = "composed"  # an image and a change: describe only the *target*
    REWRITE = "rewrite"  # QAR: a candidate, seen in the light of the query


class MediaKind(enum.StrEnum):
    IMAGE = "image"
    VIDEO = "video"
    PAGE = "page"


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Media:
    """Encoded media: a PNG/JPEG/WebP image, a video file, or one page of a PDF.

    Attributes:
      data: the encoded file.
      kind: what it is.
      page: zero-based page number, for `MediaKind.PAGE` only.
    """

    data: bytes
    kind: MediaKind = MediaKind.IMAGE
    page: int = 0

    @cached_property  # of megabytes, and every layer asks for it
    def sha256(self) -> str:
        """Content hash (64 hex characters), the key of every cache and of the media store."""
        return hashlib.sha256(self.data).hexdigest()


Part = Text | Media


@dataclass(frozen=True)
class Content:
    """An ordered list of parts. A query or a document is one `Content`."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, text: str = "", *images: bytes) -> Content:
        """Images first, then the text; either may be missing."""
        parts: list[Part] = [Media(data) for data in images]
        if text:
            parts.append(Text(text))
        return cls(tuple(parts))

    @property
    def text(self) -> str:
        return " ".join(p.text for p in self.parts if isinstance(p, Text)).strip()

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(p for p in self.parts if isinstance(p, Media))

    @property
    def empty(self) -> bool:
        return not self.media and not self.text

    @property
    def content_hash(self) -> str:
        """Hash over kinds, pages, bytes and texts, in order."""
        return content_hash(self.parts)


class HashedMedia(Protocol):
    """Media, whether its bytes are at hand or not."""

    @property
    def kind(self) -> MediaKind: ...
    @property
    def page(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def content_hash(parts: Iterable[Text | Media | HashedMedia]) -> str:
    """Hash over kinds, pages, bytes and texts, in order."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Text):
            raw = part.text.encode()
            h.update(b"t%d:" % len(raw) + raw)
        else:
            h.update(f"m{part.kind}:{part.page}:{part.sha256};".encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Reasoning:
    """An embedding-centric reasoning (ECR): `<think>…</think>` and an answer line.

    Attributes:
      text: the whole generated text, tags included, ready to be put in the assistant turn.
      think: the part between the think tags, stripped.
      answer: the answer or summary line without its label, stripped.
      tokens: how many tokens were generated (forced ones included).
      truncated: whether the budget closed the think block before the model did.
    """

    text: str
    think: str
    answer: str
    tokens: int = 0
    truncated: bool = False


NO_REASONING = Reasoning(text="", think="", answer="")


@dataclass(frozen=True)
class Budget:
    """What one search may spend. Zero switches a stage off.

    Attributes:
      reasoning_tokens: new tokens for the query's ECR.
      candidates: K, how many candidates the first stage keeps.
      rewrite_depth: how many candidates QAR rewrites; 0 = off.
      rewrite_tokens: new tokens for each rewrite.
      rerank_depth: how many candidates the reranker scores; the rest keep their order below.
    """

    reasoning_tokens: int = 64
    candidates: int = 50
    rewrite_depth: int = 0
    rewrite_tokens: int = 64
    rerank_depth: int = 10


@dataclass(frozen=True)
class Usage:
    """What one stage spent. Times are seconds; queue time is spent waiting, compute time working.

    `wall_s` is what the caller saw, transport included; only the caller can fill it in, so a
    stage leaves it at 0 and the cascade sets it.

    `within` names the stage in whose call the work was done (a unified model embeds within
    `reason`); it has no call of its own then, so no wall time. Empty = a call of its own.
    """

    stage: str
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    model_version: str = ""
    wall_s: float = 0.0
    within: str = ""


@dataclass(frozen=True)
class Document:
    """A stored document: what was ingested and what the models made of it."""

    id: str
    content: Content
    metadata: Metadata = field(default_factory=dict)
    reasoning: Reasoning = NO_REASONING
    sequence: int = 0


@dataclass(frozen=True)
class Candidate:
    """One search result with the score of every stage that saw it.

    Attributes:
      id: document id.
      cosine: first-stage cosine similarity.
      rerank: P(yes) of the reranker in [0, 1], or None when it did not score this candidate.
      reasoning: the document's ECR as it was at ingest.
      rewrite: the query-aware rewrite (QAR) of it, or None.
      metadata: the document's metadata.
    """

    id: str
    cosine: float
    rerank: float | None = None
    reasoning: Reasoning = NO_REASONING
    rewrite: Reasoning | None = None
    metadata: Metadata = field(default_factory=dict)
