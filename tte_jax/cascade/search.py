"""Anytime search: reason → embed → ANN → rewrite → rerank, streaming the best ranking so far."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tte_jax.cascade import degradation
from tte_jax.cascade.batches import messages
from tte_jax.cascade.calls import bounded, now, relocated
from tte_jax.cascade.messages import (
    Degraded,
    SearchQuery,
    SearchStage,
    SearchUpdate,
)
from tte_jax.cascade.planning import (
    optional_time,
    reasoning_time,
    required_time,
    rerank_reserve,
)
from tte_jax.cascade.texts import rerank_text
from tte_jax.cascade.validation import validate
from tte_jax.content import NO_REASONING, Candidate, Document, Reasoning, Side, Task, Usage
from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    PreconditionError,
    TteError,
)
from tte_jax.stages import Embedding, EmbedItem, Hit, ReasonItem

if TYPE_CHECKING:
    from tte_jax.cascade.cascade import Cascade

T = TypeVar("T")
Answers = TypeVar("Answers", list[Reasoning], np.ndarray)
log = logging.getLogger(__name__)

# Where what a stage is given stands in a search request.
_PLACES = {"content": "query", "instruction": "instruction"}
# The candidate in an error of the reranker, or of the reasoner that rewrites it.
_CANDIDATE = re.compile(r"(?:candidates|inputs)\[(\d+)\](?:\.content|$)")


class Search:
    """The state of one search."""

    def __init__(self, cascade: Cascade, query: SearchQuery) -> None:
        self.cascade = cascade
        self.query = query
        self.usage: list[Usage] = []
        self.degraded: list[Degraded] = []
        self.query_reasoning = NO_REASONING
        self.query_embedding: Embedding | None = None
        self.started = 0.0

    async def run(self) -> AsyncGenerator[SearchUpdate, None]:
        validate(self.query)
        self.started = now()
        budget = self.query.budget

        if budget.reasoning_tokens:
            self.query_reasoning = await self._reason()
        candidates = [_candidate(hit) for hit in await self._first_stage()]

        stage = SearchStage.FIRST_STAGE
        more = bool(candidates) and (budget.rewrite_depth > 0 or budget.rerank_depth > 0)
        yield self._update(stage, candidates, final=not more)
        if not more:
            return

        documents: dict[str, Document] = {}
        if budget.rewrite_depth:
            documents = await self._fetch(candidates[: budget.rewrite_depth])
            rewritten = await self._rewrite(candidates, documents)
            if rewritten is not None:
                stage, candidates = SearchStage.REWRITTEN, rewritten
                if budget.rerank_depth:
                    yield self._update(stage, candidates, final=False)

        if budget.rerank_depth:
            reranked = await self._rerank(candidates, documents)
            if reranked is not None:
                stage, candidates = SearchStage.RERANKED, reranked
        yield self._update(stage, candidates, final=True)

    # --- required: their errors are the search's errors ---

    async def _first_stage(self) -> list[Hit]:
        if self.query_embedding is not None:
            made = self.query_embedding
            try:
                return await self._nearest(made.vector, made.usage.model_version)
            except PreconditionError as error:
                if error.reason != "EMBEDDER_MISMATCH":
                    raise
                # The corpus has other vectors by now; the embedder says whose.
                self.cascade.change_over(error)
                self.cascade.embedder_version = ""
        try:
            return await self._find()
        except PreconditionError as error:
            if not self.cascade.change_over(error):
                raise
        return await self._find()

    async def _find(self) -> list[Hit]:
        query, caps = self.query, self.cascade.caps
        item = EmbedItem(
            content=query.content,
            side=Side.QUERY,
            reasoning=self.query_reasoning.text,
            instruction=query.instruction,
        )
        timeout = self._required("embed", caps.embed)
        try:
            vectors = await self._call(
                "embed", lambda: self.cascade.embedder.embed([item], timeout_s=timeout), timeout
            )
        except InvalidInputError as error:
            raise relocated(error, _PLACES) from None
        if vectors.shape[0] != 1 or not np.isfinite(vectors).all():
            raise InternalError(
                "the embedder answered with an unusable vector for the query", stage="embed"
            )
        # `_call` has just noted it; a corpus of another embedder refuses the vector.
        version = self.cascade.embedder_version = self.usage[-1].model_version
        return await self._nearest(vectors[0], version)

    async def _nearest(self, vector: np.ndarray, embedder_version: str) -> list[Hit]:
        query, caps = self.query, self.cascade.caps
        k = max(query.budget.candidates, query.top_k)
        timeout = self._required("index", caps.index)
        return await self._call(
            "index",
            lambda: self.cascade.index.search(
                vector,
                k=k,
                filter=query.filter,
                embedder_version=embedder_version,
                timeout_s=timeout,
            ),
            timeout,
        )

    def _required(self, stage: str, cap: float) -> float | None:
        remaining = self._remaining()
        timeout = required_time(remaining, cap)
        if timeout is None:
            raise DeadlineExceededError(
                f"{self.query.deadline_s:.3g} s were allowed and none is left to {stage}; "
                "allow more time",
                stage=stage,
            )
        return timeout

    # --- optional: their errors degrade the search ---

    async def _reason(self) -> Reasoning:
        query = self.query
        tokens = query.budget.reasoning_tokens
        timeout = reasoning_time(
            self._remaining(), max_tokens=tokens, pace=self.cascade.pace, caps=self.cascade.caps
        )
        if timeout is None:
            self._no_time("reason")
            return NO_REASONING
        item = ReasonItem(content=query.content, side=Side.QUERY, instruction=query.instruction)
        try:
            (reasoning,), (embedding,) = await self._call(
                "reason",
                lambda: self.cascade.reason([item], max_tokens=tokens, timeout_s=timeout),
                timeout,
            )
        except InvalidInputError as error:
            # The query itself is at fault, and the embedder would say the same, later.
            raise relocated(error, _PLACES) from None
        except TteError as error:
            self._failed("reason", error)
            return NO_REASONING
        if embedding is not None:
            self.query_embedding = embedding
            self.usage.append(embedding.usage)
        return reasoning

    async def _fetch(self, candidates: Sequence[Candidate]) -> dict[str, Document]:
        """The candidates' documents by id; without those that are gone or cannot be read now."""
        ids = [candidate.id for candidate in candidates]
        cascade = self.cascade
        _, timeout = optional_time(
            self._remaining(),
            stage="fetch",
            depth=1,
            reserve=0.0,
            pace=cascade.pace,
            cap=cascade.caps.fetch,
        )
        if timeout <= 0.0:
            self._no_time("fetch")
            return {}

        async def get() -> tuple[list[Document | None], Usage]:
            return await cascade.index.get(ids, timeout_s=timeout), Usage(stage="fetch")

        try:
            documents = await self._call("fetch", get, timeout)
        except TteError as error:
            self._failed("fetch", error)
            return {}
        return {document.id: document for document in documents if document is not None}

    async def _rewrite(
        self, candidates: Sequence[Candidate], documents: dict[str, Document]
    ) -> list[Candidate] | None:
        """QAR: the candidates with a query-aware rewrite of the top ones; `None` = not done."""
        query, cascade = self.query, self.cascade
        budget = query.budget
        wanted = [c for c in candidates[: budget.rewrite_depth] if c.id in documents]
        if not wanted:
            return None
        depth, timeout = optional_time(
            self._remaining(),
            stage="rewrite",
            depth=len(wanted),
            reserve=rerank_reserve(cascade.pace, depth=min(budget.rerank_depth, len(candidates))),
            pace=cascade.pace,
            cap=cascade.caps.rewrite,
        )
        if depth < len(wanted):
            self._no_time("rewrite", done=depth, wanted=len(wanted))
        if depth == 0:
            return None
        until = now() + timeout

        async def call(some: Sequence[Candidate], time: float) -> list[Reasoning]:
            items = [
                ReasonItem(
                    content=documents[candidate.id].content,
                    side=Side.DOCUMENT,
                    instruction=query.instruction,
                    task=Task.REWRITE,
                    query=query.content,
                    query_reasoning=self.query_reasoning.text,
                    candidate_reasoning=candidate.reasoning.text,
                )
                for candidate in some
            ]
            answers: list[Reasoning] = []
            for part in messages(items):
                left = until - now() if answers else time
                try:
                    answers += await self._call(
                        "rewrite",
                        lambda part=part, left=left: cascade.reasoner.reason(
                            part, max_tokens=budget.rewrite_tokens, timeout_s=left
                        ),
                        left,
                        units=len(part),
                    )
                except InvalidInputError as error:
                    error.field = _shifted(error.field, len(answers))
                    raise
            return answers

        done = await self._sparing("rewrite", wanted[:depth], lambda: until - now(), call)
        if done is None:
            return None
        by_id = {c.id: r for c, r in zip(*done, strict=True) if r.text}
        return [replace(c, rewrite=by_id.get(c.id)) for c in candidates]

    async def _rerank(
        self, candidates: Sequence[Candidate], documents: dict[str, Document]
    ) -> list[Candidate] | None:
        """The head sorted by P(yes), the unscored tail behind it; `None` = not done."""
        query, cascade = self.query, self.cascade
        asked = rerank_text(self.query_reasoning, query.content)
        if not asked:
            self.degraded.append(degradation.no_query_text())
            return None
        head = candidates[: query.budget.rerank_depth]
        bare = [c for c in head if not _candidate_text(c, documents)]
        if bare:
            documents = {**documents, **await self._fetch(bare)}
        texts = {c.id: _candidate_text(c, documents) for c in head}
        # A candidate with no text at all (an image stored without reasoning) cannot be scored.
        scorable = [c for c in head if texts[c.id]]
        if not scorable:
            return None
        depth, _ = optional_time(
            self._remaining(),
            stage="rerank",
            depth=len(scorable),
            reserve=0.0,
            pace=cascade.pace,
            cap=cascade.caps.rerank,
        )
        if depth < len(scorable):
            self._no_time("rerank", done=depth, wanted=len(scorable))
        if depth == 0:
            return None
        done = await self._sparing(
            "rerank",
            scorable[:depth],
            lambda: required_time(self._remaining(), cascade.caps.rerank),
            lambda some, time: self._score(asked, [texts[c.id] for c in some], time),
        )
        if done is None:
            return None
        scores = {c.id: float(score) for c, score in zip(*done, strict=True)}
        top = [replace(c, rerank=scores[c.id]) for c in scorable if c.id in scores]
        # Stable: equal scores keep their first-stage order.
        top.sort(key=lambda c: -scores[c.id])
        return top + [c for c in candidates if c.id not in scores]

    async def _score(self, asked: str, texts: Sequence[str], timeout: float) -> np.ndarray:
        scores = await self._call(
            "rerank",
            lambda: self.cascade.reranker.rerank(
                asked, texts, instruction=self.query.instruction, timeout_s=timeout
            ),
            timeout,
            units=len(texts),
        )
        if scores.shape != (len(texts),) or not np.isfinite(scores).all():
            raise InternalError(
                "the reranker's scores are not one finite number per candidate",
                reason="NOT_FINITE",
            )
        return scores

    async def _sparing(
        self,
        stage: str,
        candidates: Sequence[Candidate],
        time_left: Callable[[], float | None],
        call: Callable[[Sequence[Candidate], float], Awaitable[Answers]],
    ) -> tuple[list[Candidate], Answers] | None:
        """`call(candidates, seconds)`, made again without each candidate that it refuses.

        Returns:
          The candidates that were taken, and their answers; `None` = the stage was not done, and
          `degraded` says why.
        """
        left, refusals, answers = list(candidates), [], None
        while left and answers is None:
            time = time_left()
            if time is None or time <= 0.0:
                self._no_time(stage)
                return None
            try:
                answers = await call(left, time)
            except TteError as error:
                at = _refused(error)
                if at is None or at >= len(left):
                    self._failed(stage, error)
                    return None
                del left[at]
                refusals.append(error.reason)
        if refusals:
            self.degraded.append(
                degradation.refused(stage, refusals[0], count=len(refusals), wanted=len(candidates))
            )
        return None if answers is None else (left, answers)

    # --- bookkeeping ---

    def _remaining(self) -> float | None:
        if self.query.deadline_s is None:
            return None
        return self.query.deadline_s - (now() - self.started)

    async def _call(
        self,
        stage: str,
        call: Callable[[], Awaitable[tuple[T, Usage]]],
        timeout_s: float | None,
        *,
        units: float = 1.0,
    ) -> T:
        """Calls a stage within `timeout_s`; notes its usage, and its time for later plans."""
        cascade, began = self.cascade, now()
        try:
            value, usage = await bounded(stage, call(), timeout_s)
        except TteError as error:
            wall = now() - began
            self.usage.append(Usage(stage=stage, wall_s=wall))
            if isinstance(error, DeadlineExceededError):
                if stage == "reason":
                    units = cascade.pace.reason_tokens or self.query.budget.reasoning_tokens
                cascade.pace = cascade.pace.overran(stage, wall, units)
            raise
        wall = now() - began
        self.usage.append(replace(usage, stage=stage, wall_s=wall))
        if stage == "reason":
            units = usage.tokens_out
        cascade.pace = cascade.pace.observed(stage, wall, units)
        return value

    def _failed(self, stage: str, error: TteError) -> None:
        log.warning("degraded search: %s: %s: %s", stage, error.reason, error.message)
        self.degraded.append(degradation.failed(stage, error))

    def _no_time(self, stage: str, *, done: int = 0, wanted: int = 0) -> None:
        if done:
            self.degraded.append(degradation.fewer(stage, done=done, wanted=wanted))
        else:
            self.cascade.pace = self.cascade.pace.skipped(stage)
            self.degraded.append(degradation.no_time(stage))

    def _update(
        self, stage: SearchStage, candidates: Sequence[Candidate], *, final: bool
    ) -> SearchUpdate:
        include = self.query.include
        results = tuple(candidates[: self.query.top_k])
        if not include.reasoning:
            results = tuple(replace(c, reasoning=NO_REASONING, rewrite=None) for c in results)
        return SearchUpdate(
            stage=stage,
            results=results,
            final=final,
            query_reasoning=self.query_reasoning if include.reasoning else NO_REASONING,
            usage=tuple(self.usage) if include.timings else (),
            degraded=tuple(self.degraded),
        )


def _refused(error: TteError) -> int | None:
    """Which candidate the reasoner or the reranker does not take; `None` for any other error."""
    found = _CANDIDATE.match(error.field) if isinstance(error, InvalidInputError) else None
    return int(found[1]) if found else None


def _shifted(field: str, by: int) -> str:
    """The path of a candidate in the whole list, of one in a part that begins at `by`."""
    found = _CANDIDATE.match(field)
    if found is None:
        return field
    return f"{field[: found.start(1)]}{int(found[1]) + by}{field[found.end(1) :]}"


def _candidate(hit: Hit) -> Candidate:
    return Candidate(id=hit.id, cosine=hit.cosine, reasoning=hit.reasoning, metadata=hit.metadata)


def _candidate_text(candidate: Candidate, documents: dict[str, Document]) -> str:
    """The rewrite, else the ECR, else the document's own text; empty when it has none of them."""
    if candidate.rewrite is not None:
        return rerank_text(candidate.rewrite)
    document = documents.get(candidate.id)
    return rerank_text(candidate.reasoning, document.content if document else None)
