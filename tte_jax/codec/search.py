"""Searches and ingests: the messages of `tte_jax.cascade` to and from `RetrievalService`'s."""

from __future__ import annotations

from tte.v1 import retrieval_pb2
from tte_jax import errors, limits
from tte_jax.cascade.messages import (
    Degraded,
    Include,
    IngestOptions,
    IngestUpdate,
    ItemResult,
    ItemState,
    SearchQuery,
    SearchStage,
    SearchUpdate,
)
from tte_jax.codec.contents import (
    check_id,
    check_text,
    decode_content,
    decode_reasoning,
    encode_content,
    encode_reasoning,
)
from tte_jax.codec.metadata import decode_filter, decode_metadata, encode_filter, encode_metadata
from tte_jax.codec.stages import decode_budget, decode_usage, encode_budget, encode_usage
from tte_jax.content import Candidate, Document
from tte_jax.errors import InvalidInputError, TteError

_STAGES = {
    retrieval_pb2.SEARCH_STAGE_FIRST_STAGE: SearchStage.FIRST_STAGE,
    retrieval_pb2.SEARCH_STAGE_REWRITTEN: SearchStage.REWRITTEN,
    retrieval_pb2.SEARCH_STAGE_RERANKED: SearchStage.RERANKED,
}
_STAGE_NUMBERS = {stage: number for number, stage in _STAGES.items()}
_STATES = {
    retrieval_pb2.INGEST_STATE_STORED: ItemState.STORED,
    retrieval_pb2.INGEST_STATE_SKIPPED: ItemState.SKIPPED,
    retrieval_pb2.INGEST_STATE_FAILED: ItemState.FAILED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


def encode_query(query: SearchQuery) -> retrieval_pb2.SearchRequest:
    """`deadline_s` is left out: it travels as the RPC's deadline."""
    return retrieval_pb2.SearchRequest(
        query=encode_content(query.content),
        instruction=query.instruction,
        top_k=query.top_k,
        filter=None if query.filter is None else encode_filter(query.filter),
        budget=encode_budget(query.budget),
        include=retrieval_pb2.SearchInclude(
            scores=query.include.scores,
            reasonings=query.include.reasoning,
            timings=query.include.timings,
        ),
    )


def decode_query(
    message: retrieval_pb2.SearchRequest, *, deadline_s: float | None = None
) -> SearchQuery:
    """A search as it was asked for; `deadline_s` are the seconds left to the RPC.

    Raises:
      InvalidInputError: empty query, or a value out of range; the path names the field.
    """
    top_k = message.top_k if message.HasField("top_k") else limits.DEFAULT_TOP_K
    if not 1 <= top_k <= limits.MAX_TOP_K:
        raise InvalidInputError(
            f"top_k is {top_k}: expected 1 to {limits.MAX_TOP_K}",
            field="top_k",
            limit=limits.MAX_TOP_K,
        )
    include = Include()
    if message.HasField("include"):
        wanted = message.include
        include = Include(wanted.scores, wanted.reasonings, wanted.timings)
    return SearchQuery(
        content=decode_content(message.query, "query"),
        top_k=top_k,
        instruction=check_text(message.instruction, "instruction", limits.MAX_INSTRUCTION_CHARS),
        filter=decode_filter(message.filter, "filter") if message.HasField("filter") else None,
        budget=decode_budget(message.budget, "budget"),
        include=include,
        deadline_s=deadline_s,
    )


def encode_update(update: SearchUpdate, *, scores: bool = True) -> retrieval_pb2.SearchResponse:
    """`scores=False` leaves the scores out; the rest is left out by the cascade already."""
    return retrieval_pb2.SearchResponse(
        stage=_STAGE_NUMBERS[update.stage],
        candidates=[_encode_candidate(c, scores) for c in update.results],
        query_reasoning=encode_reasoning(update.query_reasoning),
        usages=[encode_usage(usage) for usage in update.usage],
        final=update.final,
        degraded=[
            retrieval_pb2.Degradation(stage=d.stage, reason=d.reason, message=d.message)
            for d in update.degraded
        ],
    )


def decode_update(message: retrieval_pb2.SearchResponse) -> SearchUpdate:
    """Scores have float32 precision; a cosine that was left out reads as NaN."""
    return SearchUpdate(
        stage=_STAGES[message.stage],
        results=tuple(_decode_candidate(c) for c in message.candidates),
        final=message.final,
        query_reasoning=decode_reasoning(message.query_reasoning),
        usage=tuple(decode_usage(usage) for usage in message.usages),
        degraded=tuple(Degraded(d.stage, d.reason, d.message) for d in message.degraded),
    )


def encode_ingest_options(options: IngestOptions) -> retrieval_pb2.IngestRequest:
    return retrieval_pb2.IngestRequest(
        options=retrieval_pb2.IngestOptions(
            reasoning_tokens=options.reasoning_tokens,
            instruction=options.instruction,
            redo_unchanged=not options.skip_stored,
        )
    )


def decode_ingest_options(message: retrieval_pb2.IngestOptions) -> IngestOptions:
    """Raises InvalidInputError."""
    tokens = IngestOptions().reasoning_tokens
    if message.HasField("reasoning_tokens"):
        tokens = message.reasoning_tokens
    if tokens > limits.MAX_NEW_TOKENS:
        raise InvalidInputError(
            f"options.reasoning_tokens is {tokens}: at most {limits.MAX_NEW_TOKENS} are accepted",
            field="options.reasoning_tokens",
            limit=limits.MAX_NEW_TOKENS,
        )
    return IngestOptions(
        reasoning_tokens=tokens,
        instruction=check_text(
            message.instruction, "options.instruction", limits.MAX_INSTRUCTION_CHARS
        ),
        skip_stored=not message.redo_unchanged,
    )


def encode_ingest_document(document: Document) -> retrieval_pb2.IngestRequest:
    return retrieval_pb2.IngestRequest(
        document=retrieval_pb2.IngestDocument(
            id=document.id,
            content=encode_content(document.content),
            metadata=encode_metadata(document.metadata),
        )
    )


def decode_ingest_document(message: retrieval_pb2.IngestDocument) -> Document:
    """Raises InvalidInputError; the caller turns it into that document's own failure."""
    return Document(
        id=check_id(message.id, "document.id"),
        content=decode_content(message.content, "document.content"),
        metadata=decode_metadata(message.metadata, "document.metadata"),
    )


def encode_ingest_update(update: IngestUpdate) -> retrieval_pb2.IngestResponse:
    return retrieval_pb2.IngestResponse(
        results=[_encode_result(result) for result in update.results],
        progress=retrieval_pb2.IngestProgress(
            received=update.received,
            stored=update.stored,
            skipped=update.skipped,
            failed=update.failed,
        ),
        sequence=update.sequence,
        usages=[encode_usage(usage) for usage in update.usage],
        final=update.final,
    )


def decode_ingest_update(message: retrieval_pb2.IngestResponse) -> IngestUpdate:
    return IngestUpdate(
        results=tuple(_decode_result(result) for result in message.results),
        received=message.progress.received,
        stored=message.progress.stored,
        skipped=message.progress.skipped,
        failed=message.progress.failed,
        sequence=message.sequence,
        usage=tuple(decode_usage(usage) for usage in message.usages),
        final=message.final,
    )


def _encode_candidate(candidate: Candidate, scores: bool) -> retrieval_pb2.Candidate:
    rewrite = candidate.rewrite
    return retrieval_pb2.Candidate(
        id=candidate.id,
        cosine=candidate.cosine if scores else None,
        rerank=candidate.rerank if scores else None,
        reasoning=encode_reasoning(candidate.reasoning),
        rewrite=None if rewrite is None else encode_reasoning(rewrite),
        metadata=encode_metadata(candidate.metadata),
    )


def _decode_candidate(message: retrieval_pb2.Candidate) -> Candidate:
    return Candidate(
        id=message.id,
        cosine=message.cosine if message.HasField("cosine") else float("nan"),
        rerank=message.rerank if message.HasField("rerank") else None,
        reasoning=decode_reasoning(message.reasoning),
        rewrite=decode_reasoning(message.rewrite) if message.HasField("rewrite") else None,
        metadata=decode_metadata(message.metadata, "candidate.metadata"),
    )


def _encode_result(result: ItemResult) -> retrieval_pb2.IngestResult:
    failure = None
    if result.error is not None:
        failure = retrieval_pb2.IngestFailure(
            reason=result.error.reason,
            message=result.error.message,
            field=getattr(result.error, "field", ""),
            code=result.error.code,
        )
    return retrieval_pb2.IngestResult(
        position=result.position,
        id=result.id,
        state=_STATE_NUMBERS[result.state],
        failure=failure,
    )


def _decode_result(message: retrieval_pb2.IngestResult) -> ItemResult:
    error = None
    if message.HasField("failure"):
        error = _error(message.failure)
    return ItemResult(message.position, message.id, _STATES[message.state], error)


def _error(failure: retrieval_pb2.IngestFailure) -> TteError:
    if failure.code == InvalidInputError.code:
        return InvalidInputError(failure.message, field=failure.field, reason=failure.reason)
    # Two types share RESOURCE_EXHAUSTED; the reason tells them apart.
    kinds = [t for t in vars(errors).values() if isinstance(t, type) and issubclass(t, TteError)]
    same_code = [t for t in kinds if t is not TteError and t.code == failure.code]
    same_reason = [t for t in same_code if t.default_reason == failure.reason]
    kind = (same_reason or same_code or [errors.InternalError])[0]
    return kind(failure.message, reason=failure.reason)
