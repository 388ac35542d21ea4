"""The pipeline: four stages, and the search and the ingest over them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

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
from tte_jax.stages import EmbedderStage, IndexStage, ReasonerStage, RerankerStage


class Cascade:
    """Search and ingest over four stages. One object serves any number of concurrent calls.

    It measures what the stages take and plans the searches that have a deadline by it.

    Attributes:
      caps: the longest one call of a stage may take in a search.
      pace: what the stages have been taking lately.
    """

    def __init__(
        self,
        reasoner: ReasonerStage,
        embedder: EmbedderStage,
        index: IndexStage,
        reranker: RerankerStage,
        *,
        caps: Caps | None = None,
    ) -> None:
        self.reasoner = reasoner
        self.embedder = embedder
        self.index = index
        self.reranker = reranker
        self.caps = caps or Caps()
        self.pace = Pace()

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
