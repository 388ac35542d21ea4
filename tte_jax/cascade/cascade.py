"""The pipeline: four stages, and the search and the ingest over them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import numpy as np

from tte_jax.cascade.ingest import Ingest
from tte_jax.cascade.messages import (
    IngestInput,
    IngestOptions,
    IngestUpdate,
    SearchQuery,
    SearchUpdate,
)
from tte_jax.cascade.planning import Caps, Pace
from tte_jax.cascade.search import Search
from tte_jax.content import Reasoning, Usage
from tte_jax.errors import TteError
from tte_jax.stages import (
    EmbedderStage,
    Embedding,
    EmbeddingReasonerStage,
    IndexStage,
    ReasonerStage,
    ReasonItem,
    RerankerStage,
)

log = logging.getLogger(__name__)


class Cascade:
    """Search and ingest over four stages. One object serves any number of concurrent calls.

    It measures what the stages take and plans the searches that have a deadline by it.

    Attributes:
      caps: the longest one call of a stage may take in a search.
      pace: what the stages have been taking lately.
      next_embedder: takes the embedder's place when the corpus changes over to its vectors.
      reasoner_version, embedder_version: of the models that answered last; empty = not known.
    """

    def __init__(
        self,
        reasoner: ReasonerStage,
        embedder: EmbedderStage,
        index: IndexStage,
        reranker: RerankerStage,
        *,
        next_embedder: EmbedderStage | None = None,
        caps: Caps | None = None,
    ) -> None:
        self.reasoner = reasoner
        self.embedder = embedder
        self.next_embedder = next_embedder
        self.index = index
        self.reranker = reranker
        self.expected_version = ""
        self.reasoner_version = ""
        self.embedder_version = ""
        self.caps = caps or Caps()
        self.pace = Pace()

    def change_over(self, error: TteError) -> bool:
        """Whether `error` says that the corpus has the other embedder's vectors now, and there is
        one; the two have then changed places (and do so again when the corpus goes back)."""
        if error.reason != "EMBEDDER_MISMATCH" or self.next_embedder is None:
            return False
        if error.metadata.get("expected") == self.expected_version:
            return True  # another call has changed over already
        self.expected_version = error.metadata.get("expected", "")
        self.embedder, self.next_embedder = self.next_embedder, self.embedder
        self.embedder_version = ""
        log.warning("the corpus holds vectors of %s: changing over", self.expected_version)
        return True

    @property
    def unified(self) -> bool:
        """Whether the reasoner may be able to embed in the embedder's place: it knows how to be
        asked, and both answered last with one and the same model."""
        same = self.reasoner_version == self.embedder_version != ""
        return same and isinstance(self.reasoner, EmbeddingReasonerStage)

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None
    ) -> tuple[tuple[list[Reasoning], list[Embedding | None]], Usage]:
        """ECRs of what will be embedded next, with the vectors that the embedder would make of them
        where the reasoner makes them; `None` = the embedder is still to be asked.

        Raises: as `ReasonerStage.reason`.
        """
        stage, version = self.reasoner, self.embedder_version
        embeddings: list[Embedding | None] = [None] * len(items)
        if self.unified and isinstance(stage, EmbeddingReasonerStage):
            reasonings, embeddings, usage = await stage.reason_and_embed(
                items, max_tokens=max_tokens, timeout_s=timeout_s
            )
        else:
            reasonings, usage = await stage.reason(
                items, max_tokens=max_tokens, timeout_s=timeout_s
            )
        self.reasoner_version = usage.model_version
        same = [e if e is not None and _usable(e, version) else None for e in embeddings]
        return (reasonings, same), usage

    def search(self, query: SearchQuery) -> AsyncGenerator[SearchUpdate, None]:
        """Streams rankings: the first-stage one first, refinements after it, the last is final.

        With nothing to refine there is one update. Closing the iterator, or cancelling the task
        that iterates, cancels the stage call that is under way.

        A reasoner, rewrite or reranker that fails or has no time shows up in `degraded`.

        Raises:
          InvalidInputError: empty query, wrong top_k or budget, or content a model cannot read.
          DeadlineExceededError: no time for the first stage.
          TteError: the embedder's or the index's own error, e.g. `UnavailableError`.
        """
        return Search(self, query).run()

    def ingest(
        self, documents: AsyncIterator[IngestInput], options: IngestOptions | None = None
    ) -> AsyncGenerator[IngestUpdate, None]:
        """Stores documents: reason, embed and write overlap; reports them as they are settled.

        A result `STORED` or `SKIPPED` means durable. Results come in any order, one per document;
        of two documents with one id the later one stays. A document that cannot be read fails
        alone. When a stage is down for longer than `options.patience_s`, everything that was
        already on its way is settled and reported, and then the stage's error is raised; sending
        the same documents again resumes.

        Raises:
          UnavailableError, OverloadedError, DeadlineExceededError: a stage stays away.
          PreconditionError: the corpus holds vectors of another embedder version.
          StorageFullError: no disk space is left.
        """
        return Ingest(self, documents, options or IngestOptions()).run()


def _usable(embedding: Embedding, version: str) -> bool:
    """Whether it stands for an answer of the embedder of that version."""
    return embedding.usage.model_version == version and bool(np.isfinite(embedding.vector).all())
