"""Runs the cascade over a task: candidates are ingested once, queries searched once per arm.

The cascade is `tte_jax.cascade.Cascade`, the object that the gateway serves; only its index is
another one (`pool_index`), since a query's candidates are its own. The stages are in this process
or are running services.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from tte_jax import limits
from tte_jax.cascade import Caps, Cascade, IngestOptions, SearchQuery, SearchUpdate
from tte_jax.cascade.messages import IngestInput, ItemState, Rejected
from tte_jax.content import NO_REASONING, Candidate, Content, Document, Reasoning, Side, Usage
from tte_jax.errors import (
    InternalError,
    InvalidInputError,
    TteError,
    UnavailableError,
    UnsupportedError,
)
from tte_jax.evaluation.arms import Arm, Ecr
from tte_jax.evaluation.metrics import Ranked
from tte_jax.evaluation.pool_index import PoolIndex
from tte_jax.evaluation.reasoners import Recorded, Trimmed
from tte_jax.evaluation.task import EvalTask, Item, Query
from tte_jax.stages import EmbedderStage, IndexStage, ReasonerStage, RerankerStage

# Nothing is late in an evaluation; a stage that takes this long hangs.
CALL_S = 1800.0
CAPS = Caps(CALL_S, CALL_S, CALL_S, CALL_S, CALL_S, CALL_S)
# What may be one query's fault; anything else ends the run, which can go on later.
_QUERY_ERRORS = (InvalidInputError, UnsupportedError)
# Why the cascade did without a stage that another time may be well; what else it names is of the
# data, such as a query without text or candidates that a model refuses.
_AWAY = frozenset(
    {"UNAVAILABLE", "UNREACHABLE", "CANCELLED", "WARMING_UP", "DRAINING", "OVERLOADED"}
    | {"DEADLINE_EXCEEDED", "DEADLINE_NEAR"}
)
_BROKEN = frozenset({"INTERNAL", "NAN", "NOT_FINITE"})
KEPT = 5
RANKED = 1000

Progress = Callable[[str, int, int], None]
"""(what, done, in all); 0 in all = not known."""


@dataclass(frozen=True)
class Stages:
    """The models.

    Attributes:
      recorded: the reasoner too, where ECRs were recorded.
      about: what they are, for the report: role → name, size, place.
    """

    reasoner: ReasonerStage
    embedder: EmbedderStage
    reranker: RerankerStage
    about: Mapping[str, object] = field(default_factory=dict)
    recorded: Recorded | None = None


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
      concurrency: how many searches are under way at once; 1 for latencies that mean something.
      both_sides: give both sides an ECR, not only those of the published method.
      depth: how many ids of a ranking are kept.
    """

    concurrency: int = 8
    both_sides: bool = False
    depth: int = RANKED


@dataclass(frozen=True)
class Answer:
    """What came of one query.

    Attributes:
      ranked: for the metrics.
      first: the first-stage ranking's head, to see what reranking did.
      results: the head of the last ranking, with ECRs and scores.
      degraded: what made it less than the arm asked for, `stage: reason`.
      error: why there is no ranking; it scores 0.
    """

    query: Query
    ranked: Ranked
    text: str = ""
    first: tuple[str, ...] = ()
    results: tuple[Candidate, ...] = ()
    reasoning: Reasoning = NO_REASONING
    usage: tuple[Usage, ...] = ()
    seconds: float = 0.0
    degraded: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class ArmResult:
    """One arm over one task.

    Attributes:
      pool: how many candidates were stored; `failed`: those that could not be, by reason.
      ingest: what storing them spent; of an arm whose candidates an earlier arm stored, that one's.
      recorded: where ECRs were recorded, of how many queries and candidates that were to have one
        there was one: side → (recorded, asked for).
    """

    task: EvalTask
    arm: Arm
    answers: tuple[Answer, ...]
    pool: int
    failed: Mapping[str, int]
    ingest: tuple[Usage, ...]
    recorded: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ranked(self) -> list[Ranked]:
        return [answer.ranked for answer in self.answers]


@dataclass
class _Pool:
    index: PoolIndex
    failed: Counter[str] = field(default_factory=Counter)
    usage: tuple[Usage, ...] = ()
    error: TteError | None = None


class TaskRunner:
    """One task under several arms; arms that see the same candidates share them."""

    def __init__(
        self,
        task: EvalTask,
        stages: Stages,
        settings: Settings,
        *,
        progress: Progress = lambda what, done, total: None,
        rankings: Sequence[Ranked] | None = None,
    ) -> None:
        """`rankings`: of another system, a query each; they take the first stage's place.

        Raises InvalidInputError for rankings that are not of the task's queries.
        """
        if rankings is not None:
            _check_rankings(task, rankings)
        self.task, self.stages, self.settings = task, stages, settings
        self.progress, self.rankings = progress, rankings
        self.keep_media = False
        self._pools: dict[tuple[Ecr, int], _Pool] = {}

    async def run(self, arms: Sequence[Arm]) -> AsyncIterator[ArmResult]:
        """The arms, one after the other.

        Raises:
          TteError: a stage stays away or fails, or no query at all could be answered.
        """
        self.keep_media = any(arm.rewrites for arm in arms)
        for arm in arms:
            yield await self._arm(arm)

    async def _arm(self, arm: Arm) -> ArmResult:
        recorded = self._recorded(arm, Side.QUERY, [query.id for query in self.task.queries])
        pool = await self._pool(arm)
        recorded |= self._recorded(arm, Side.DOCUMENT, pool.index.documents)
        if self.rankings is not None:
            _check_cover(self.task, self.rankings, pool.index.documents)
        done = 0
        gate = asyncio.Semaphore(self.settings.concurrency)

        async def one(number: int, query: Query) -> Answer:
            nonlocal done
            async with gate:
                answer = await self._search(arm, pool, number, query)
            done += 1
            self.progress(arm.name, done, len(self.task.queries))
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i, q)) for i, q in enumerate(self.task.queries)]
        except ExceptionGroup as errors:
            # One stage that is away fails many searches alike; the first says it.
            raise errors.exceptions[0] from None
        answers = tuple(task.result() for task in tasks)
        if answers and all(a.error for a in answers):
            raise InvalidInputError(
                f"{self.task.name}: none of its {len(answers)} queries could be run. The first: "
                f"{answers[0].error}",
                reason="NO_QUERY_RAN",
            )
        return ArmResult(
            self.task,
            arm,
            answers,
            len(pool.index.documents),
            dict(pool.failed),
            pool.usage,
            recorded,
        )

    def _reasons(self, arm: Arm, side: Side) -> bool:
        """Whether a side gets an ECR."""
        published = self.task.ecr_query if side is Side.QUERY else self.task.ecr_target
        return arm.ecr is not Ecr.NONE and (published or self.settings.both_sides)

    def _recorded(self, arm: Arm, side: Side, ids: Collection[str]) -> dict[str, tuple[int, int]]:
        if self.stages.recorded is None or not self._reasons(arm, side):
            return {}
        name = "query" if side is Side.QUERY else "target"
        return {name: self.stages.recorded.count(self.task.name, side, ids)}

    # --- candidates ---

    async def _pool(self, arm: Arm) -> _Pool:
        reasons = self._reasons(arm, Side.DOCUMENT)
        key = (arm.ecr, arm.candidate_tokens) if reasons else (Ecr.NONE, 0)
        if key not in self._pools:
            self._pools[key] = await self._ingest(*key)
        return self._pools[key]

    async def _ingest(self, ecr: Ecr, tokens: int) -> _Pool:
        pool = _Pool(PoolIndex(keep_media=self.keep_media))
        cascade = self._cascade(ecr, pool.index)
        usage: dict[tuple[str, str], Usage] = {}
        done = 0
        for instruction, items in groupby(
            self.task.candidates(), key=lambda item: item.instruction
        ):
            options = IngestOptions(
                reasoning_tokens=tokens,
                instruction=instruction,
                skip_stored=False,
                patience_s=CALL_S,
            )
            async for update in cascade.ingest(self._documents(items), options):
                for result in update.results:
                    if result.state is ItemState.FAILED and result.error is not None:
                        pool.error = pool.error or result.error
                        pool.failed[result.error.reason] += 1
                self.progress("candidates", done + update.stored + update.failed, 0)
                if update.final:
                    done += update.stored + update.failed
                    for spent in update.usage:
                        key = (spent.stage, spent.within)
                        usage[key] = _sum(usage.get(key), spent)
        pool.usage = tuple(usage.values())
        if not pool.index.documents and pool.error is not None:
            raise InvalidInputError(
                f"{self.task.name}: none of its candidates could be stored. The first: "
                f"{pool.error.message}",
                reason="NO_CANDIDATE_STORED",
            )
        return pool

    async def _documents(self, items: Iterator[Item]) -> AsyncIterator[IngestInput]:
        for item in items:
            try:
                content = await asyncio.to_thread(item.load)
            except TteError as error:
                yield Rejected(item.name, error)
                continue
            if self.stages.recorded is not None:
                self.stages.recorded.offer(self.task.name, Side.DOCUMENT, item.name, content)
            yield Document(item.name, content)

    # --- queries ---

    async def _search(self, arm: Arm, pool: _Pool, number: int, query: Query) -> Answer:
        nothing = Ranked((), query.label, query.rel_scores)
        order = self.rankings[number].prediction if self.rankings is not None else None
        view = pool.index.view(query.pool, order)
        cascade = self._cascade(arm.ecr, view)
        try:
            content = await asyncio.to_thread(query.load)
            if self.stages.recorded is not None:
                self.stages.recorded.offer(self.task.name, Side.QUERY, query.id, content)
            reasons = self.task.ecr_query or self.settings.both_sides
            count = max(1, min(len(view.names), limits.MAX_CANDIDATES))
            request = SearchQuery(
                content,
                top_k=count,
                instruction=query.instruction,
                budget=arm.budget(candidates=count, reasons=reasons),
            )
            began = time.monotonic()
            updates = [update async for update in cascade.search(request)]
            seconds = time.monotonic() - began
        except _QUERY_ERRORS as error:
            return Answer(query, nothing, error=error.message)
        self._complete(arm, query, updates[-1])
        return self._answer(query, content, updates, view.ranking, seconds)

    def _complete(self, arm: Arm, query: Query, last: SearchUpdate) -> None:
        """Raises UnavailableError or InternalError for a search without what the arm is about."""
        for lack in last.degraded:
            if lack.reason not in _AWAY | _BROKEN:
                continue
            kind = InternalError if lack.reason in _BROKEN else UnavailableError
            hint = ", perhaps with a lower --concurrency" if lack.reason == "OVERLOADED" else ""
            raise kind(
                f"{self.task.name}, {arm.name}, query {query.id}: {lack.message} A ranking without "
                f"that is no result of this arm; what is done is kept. Run it again{hint}.",
                reason=lack.reason,
            )

    def _answer(
        self,
        query: Query,
        content: Content,
        updates: Sequence[SearchUpdate],
        ranking: Sequence[str],
        seconds: float,
    ) -> Answer:
        last = updates[-1]
        head = [candidate.id for candidate in last.results]
        # What lies behind the candidates of the cascade keeps the first stage's order.
        kept = set(head)
        prediction = head + [name for name in ranking if name not in kept]
        return Answer(
            query=query,
            ranked=Ranked(tuple(prediction[: self.settings.depth]), query.label, query.rel_scores),
            text=content.text,
            first=tuple(candidate.id for candidate in updates[0].results[:KEPT]),
            results=last.results[:KEPT],
            reasoning=last.query_reasoning,
            usage=last.usage,
            seconds=seconds,
            degraded=tuple(f"{d.stage}: {d.reason}" for d in last.degraded),
        )

    def _cascade(self, ecr: Ecr, index: IndexStage) -> Cascade:
        reasoner = self.stages.reasoner
        if ecr in (Ecr.THINK, Ecr.ANSWER):
            reasoner = Trimmed(reasoner, ecr)
        return Cascade(reasoner, self.stages.embedder, index, self.stages.reranker, caps=CAPS)


def _check_rankings(task: EvalTask, rankings: Sequence[Ranked]) -> None:
    """Whether they are of the task's queries, each with its own right answers."""
    expected = "expected a line for each query, in the order of the data set"
    if len(rankings) != len(task.queries):
        raise InvalidInputError(
            f"{task.name} has {len(task.queries)} queries and the rankings given {len(rankings)}; "
            f"{expected}.",
            field="--rankings",
        )
    for row, (query, ranked) in enumerate(zip(task.queries, rankings, strict=True), start=1):
        if other := sorted(set(query.label) ^ set(ranked.label)):
            side = "lacks" if other[0] in query.label else "has"
            raise InvalidInputError(
                f"{task.name}, row {row} of the rankings: its label {side} {other[0]!r}, and right "
                f"for query {query.id} is {_shown(query.label)}; {expected}.",
                field="--rankings",
            )


def _check_cover(
    task: EvalTask, rankings: Sequence[Ranked], stored: Mapping[str, Document]
) -> None:
    """Whether they rank what the task's queries choose from: all of it, or as much as is kept."""
    for row, (query, ranked) in enumerate(zip(task.queries, rankings, strict=True), start=1):
        named = set(ranked.prediction)
        pool = stored.keys() if query.pool is None else stored.keys() & set(query.pool)
        lacking = sorted(pool - named)
        if lacking and len(pool) - len(lacking) < RANKED:
            raise InvalidInputError(
                f"{task.name}, row {row} of the rankings: it ranks {len(pool) - len(lacking)} of "
                f"the {len(pool)} candidates of query {query.id}; the first that it lacks is "
                f"{lacking[0]!r}, and its own ids are {_shown(ranked.prediction)}. Expected every "
                f"candidate, or at least the first {RANKED:,}, under the ids of the data set.",
                field="--rankings",
            )


def _shown(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", …" if len(ids) > 3 else "") or "none"


def _sum(total: Usage | None, more: Usage) -> Usage:
    if total is None:
        return more
    return Usage(
        total.stage,
        total.tokens_in + more.tokens_in,
        total.tokens_out + more.tokens_out,
        total.cached_tokens + more.cached_tokens,
        total.queue_s + more.queue_s,
        total.compute_s + more.compute_s,
        more.model_version or total.model_version,
        total.wall_s + more.wall_s,
        more.within,
    )
