"""What goes into a search or an ingest, and what comes out while it runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tte_jax.content import (
    NO_REASONING,
    Budget,
    Candidate,
    Content,
    Document,
    Reasoning,
    Usage,
)
from tte_jax.errors import TteError
from tte_jax.filters import Filter


@dataclass(frozen=True)
class Include:
    """What the results carry besides ids, order and metadata."""

    scores: bool = True
    reasoning: bool = True
    timings: bool = True


@dataclass(frozen=True)
class SearchQuery:
    """One search.

    Attributes:
      content: what is searched for; must not be empty.
      top_k: how many results are returned, at least 1. The first stage keeps
        `max(budget.candidates, top_k)`.
      instruction: task description given to every model; empty = the prompts' own.
      filter: condition on document metadata.
      budget: what each stage may spend.
      include: what the results carry.
      deadline_s: seconds left for the whole search, `None` = no limit.
    """

    content: Content
    top_k: int = 10
    instruction: str = ""
    filter: Filter | None = None
    budget: Budget = field(default_factory=Budget)
    include: Include = field(default_factory=Include)
    deadline_s: float | None = None


class SearchStage(enum.StrEnum):
    """Which ranking an update shows."""

    FIRST_STAGE = "first_stage"
    REWRITTEN = "rewritten"
    RERANKED = "reranked"


@dataclass(frozen=True)
class Degraded:
    """A stage that was skipped, shortened or failed without failing the search.

    Attributes:
      stage: name of the stage, as in `Usage.stage`.
      reason: stable word for programs, e.g. `UNAVAILABLE`, `DEADLINE_NEAR`.
      message: what happened and what it means for the results; fit for users.
    """

    stage: str
    reason: str
    message: str


@dataclass(frozen=True)
class SearchUpdate:
    """The best ranking so far.

    Attributes:
      stage: which ranking this is.
      results: at most `top_k` candidates, best first.
      final: whether this is the last update.
      query_reasoning: the query's ECR, `NO_REASONING` when there is none or it was not asked for.
      usage: what every stage spent until now, in the order they ran; failed calls included.
      degraded: everything that made the results less than the budget promised.
    """

    stage: SearchStage
    results: tuple[Candidate, ...]
    final: bool
    query_reasoning: Reasoning = NO_REASONING
    usage: tuple[Usage, ...] = ()
    degraded: tuple[Degraded, ...] = ()


@dataclass(frozen=True)
class IngestOptions:
    """How documents are ingested. Of a client's, the first three reach the gateway; the others are
    for a cascade in this process, and the gateway has its own.

    Attributes:
      reasoning_tokens: new tokens for each document's ECR; 0 = embed without reasoning.
      instruction: task description given to the models; empty = the prompts' own.
      skip_stored: leave out documents that are stored already with the same content and metadata,
        made by the same model versions. Needs an index that can tell (`existing`).
      batch_documents: most documents in a batch.
      batch_bytes: a batch is closed when its media and texts reach this many bytes.
      linger_s: a batch that is not full waits this long for the next document.
      patience_s: how long an overloaded or unreachable stage is waited for, over all its retries,
        before the ingest stops with its error.
    """

    reasoning_tokens: int = 64
    instruction: str = ""
    skip_stored: bool = True
    batch_documents: int = 16
    batch_bytes: int = 8 << 20
    linger_s: float = 0.05
    patience_s: float = 60.0


class ItemState(enum.StrEnum):
    STORED = "stored"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class Rejected:
    """An input that cannot become a document, in its place in the stream: it fails alone."""

    id: str
    error: TteError


@dataclass(frozen=True)
class ItemResult:
    """What became of one document. `STORED` and `SKIPPED` mean durable.

    Attributes:
      position: zero-based position in the input stream (ids may repeat).
      error: why it failed, for `ItemState.FAILED` only.
    """

    position: int
    id: str
    state: ItemState
    error: TteError | None = None


@dataclass(frozen=True)
class IngestUpdate:
    """Progress of an ingest: the documents settled since the last update, and totals so far.

    Attributes:
      results: newly settled documents.
      received, stored, skipped, failed: totals since the start.
      sequence: sequence number of the last durable write, 0 before the first.
      usage: totals per stage since the start.
      final: whether every document of the input is settled.
    """

    results: tuple[ItemResult, ...]
    received: int
    stored: int
    skipped: int
    failed: int
    sequence: int = 0
    usage: tuple[Usage, ...] = ()
    final: bool = False


IngestInput = Document | Rejected
