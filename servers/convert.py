"""Requests to the arguments of the roles and the index, and their results to responses.

The values inside are converted by `tte_jax.codec`; here are the shapes of the requests and their
limits. Pure functions; every one that reads a request raises `InvalidInputError` with the path of
the field at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tte.v1 import embedder_pb2, index_pb2, reasoner_pb2, reranker_pb2
from tte_jax import codec, limits
from tte_jax.content import Budget, Content, Document, Reasoning, Usage
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.filters import Filter
from tte_jax.mining import Mined
from tte_jax.stages import (
    Embedding,
    EmbedItem,
    Hit,
    IndexEntry,
    Order,
    ReasonItem,
    Sampling,
    StagedVector,
)

T = TypeVar("T")


def reason_arguments(
    request: reasoner_pb2.ReasonRequest,
) -> tuple[list[ReasonItem], int, Sampling]:
    """(items, max new tokens of each, how they are chosen)."""
    tokens = Budget().reasoning_tokens
    if request.HasField("max_tokens"):
        tokens = request.max_tokens
    _check_range(tokens, 1, limits.MAX_NEW_TOKENS, "max_tokens")
    items = _batch(request.inputs, "inputs", codec.decode_reason_item)
    return items, tokens, codec.decode_sampling(request.sampling)


def reason_delta(index: int, text: str, tokens: int) -> reasoner_pb2.ReasonResponse:
    delta = reasoner_pb2.ReasonDelta(input_index=index, text=text, tokens=tokens)
    return reasoner_pb2.ReasonResponse(delta=delta)


def reason_result(
    index: int, reasoning: Reasoning, embedding: Embedding | None = None
) -> reasoner_pb2.ReasonResponse:
    result = reasoner_pb2.ReasonResult(
        input_index=index,
        reasoning=codec.encode_reasoning(reasoning),
        embedding=None if embedding is None else codec.encode_embedding(embedding),
    )
    return reasoner_pb2.ReasonResponse(result=result)


def reason_usage(usage: Usage) -> reasoner_pb2.ReasonResponse:
    return reasoner_pb2.ReasonResponse(usage=codec.encode_usage(usage))


def embed_arguments(request: embedder_pb2.EmbedRequest) -> tuple[list[EmbedItem], int]:
    """(items, dimension; 0 = the model's)."""
    _check_range(request.dimension, 0, limits.MAX_DIMENSION, "dimension")
    return _batch(request.inputs, "inputs", codec.decode_embed_item), request.dimension


def embed_response(embeddings: np.ndarray, usage: Usage) -> embedder_pb2.EmbedResponse:
    """`embeddings` is [B, D] float32."""
    return embedder_pb2.EmbedResponse(
        embeddings=[codec.encode_vector(row) for row in embeddings], usage=codec.encode_usage(usage)
    )


def rerank_arguments(
    request: reranker_pb2.RerankRequest,
) -> tuple[str | Content, list[str] | list[Content], str]:
    """(query, candidates, instruction); query and candidates are texts or contents."""
    query: str | Content
    candidates: list[str] | list[Content]
    if request.HasField("query_content"):
        _check_unset(request.query, "query", "query_content")
        query = codec.decode_content(request.query_content, "query_content")
    else:
        query = _rerank_text(request.query, "query")
    if request.candidate_contents:
        at = "candidate_contents"
        _check_unset(request.candidates, "candidates", at)
        _check_count(request.candidate_contents, at, limits.MAX_RERANK_CANDIDATES)
        candidates = [
            codec.decode_content(c, f"{at}[{i}]", allow_empty=True)
            for i, c in enumerate(request.candidate_contents)
        ]
    else:
        _check_count(request.candidates, "candidates", limits.MAX_RERANK_CANDIDATES)
        candidates = [
            _rerank_text(c, f"candidates[{i}]", True) for i, c in enumerate(request.candidates)
        ]
    instruction = codec.check_text(request.instruction, "instruction", limits.MAX_INSTRUCTION_CHARS)
    return query, candidates, instruction


def rerank_response(scores: np.ndarray, usage: Usage) -> reranker_pb2.RerankResponse:
    """`scores` is [N] in the order of the request."""
    return reranker_pb2.RerankResponse(
        scores=[float(score) for score in scores], usage=codec.encode_usage(usage)
    )


def listwise_texts(
    query: str | Content, candidates: list[str] | list[Content]
) -> tuple[str, list[str]]:
    """The same as texts, which is all that a listwise model reads."""
    texts = [one for one in candidates if isinstance(one, str)]
    if not isinstance(query, str) or len(texts) < len(candidates):
        raise UnsupportedError(
            "the listwise method orders texts; send `query` and `candidates`, such as the "
            "contents' reasonings",
            reason="NO_VISION",
        )
    return query, texts


def order_response(order: Order, usage: Usage) -> reranker_pb2.RerankResponse:
    return reranker_pb2.RerankResponse(
        order=reranker_pb2.ListwiseOrder(indices=order.indices, ranked=order.ranked),
        usage=codec.encode_usage(usage),
    )


def mining_texts(request: reranker_pb2.MineNegativesRequest) -> tuple[str, list[str], str]:
    """(query, [positive, *candidates], instruction): what the reranker scores."""
    codec.check_id(request.query_id, "query_id")
    _check_count(request.candidates, "candidates", limits.MAX_RERANK_CANDIDATES - 1)
    texts = [_rerank_text(request.positive.text, "positive.text")]
    for i, candidate in enumerate(request.candidates):
        texts.append(_rerank_text(candidate.text, f"candidates[{i}].text", True))
    return (
        _rerank_text(request.query, "query"),
        texts,
        codec.check_text(request.instruction, "instruction", limits.MAX_INSTRUCTION_CHARS),
    )


def mining_rules(rules: reranker_pb2.MiningRules) -> tuple[float, int]:
    """(percent of positive, number of negatives)."""
    percent = rules.percent_of_positive if rules.HasField("percent_of_positive") else 1.0
    if not 0.0 < percent <= 1.0:  # NaN fails too
        raise InvalidInputError(
            f"rules.percent_of_positive is {percent}: expected more than 0, at most 1",
            field="rules.percent_of_positive",
        )
    negatives = rules.negatives if rules.HasField("negatives") else 7
    _check_range(negatives, 1, limits.MAX_BATCH_ITEMS, "rules.negatives")
    return percent, negatives


def mined_response(
    request: reranker_pb2.MineNegativesRequest, scores: np.ndarray, mined: Mined, usage: Usage
) -> reranker_pb2.MinedNegatives:
    """`scores` is [1 + N], the positive's first; `mined` indexes the candidates."""

    def chosen(indices: Sequence[int]) -> list[reranker_pb2.MinedNegative]:
        return [
            reranker_pb2.MinedNegative(
                id=request.candidates[i].id, score=float(scores[1 + i]), candidate_index=i
            )
            for i in indices
        ]

    return reranker_pb2.MinedNegatives(
        query_id=request.query_id,
        positive_score=float(scores[0]),
        negatives=chosen(mined.negatives),
        false_negatives=chosen(mined.false_negatives),
        usage=codec.encode_usage(usage),
    )


def upsert_entries(request: index_pb2.UpsertRequest) -> list[IndexEntry]:
    entries = _batch(request.entries, "entries", codec.decode_entry)
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        if entry.document.id in seen:
            raise InvalidInputError(
                f"entries[{i}].document.id is {entry.document.id!r} again: ids of one request "
                "must differ",
                field=f"entries[{i}].document.id",
            )
        seen.add(entry.document.id)
    return entries


def document_ids(ids: Sequence[str], limit: int) -> list[str]:
    """The `ids` of a Get (limit MAX_BATCH_ITEMS) or a delete (MAX_DELETE_IDS)."""
    _check_count(ids, "ids", limit)
    return [codec.check_id(text, f"ids[{i}]") for i, text in enumerate(ids)]


def index_search_arguments(
    request: index_pb2.IndexServiceSearchRequest,
) -> tuple[np.ndarray, int, Filter | None]:
    """(vector [D] float32, k, filter); the embedder's version is plain text in the request."""
    _check_range(request.k, 1, limits.MAX_CANDIDATES, "k")
    condition = (
        codec.decode_filter(request.filter, "filter") if request.HasField("filter") else None
    )
    return codec.decode_vector(request.vector, "vector"), request.k, condition


def index_search_response(
    hits: Sequence[Hit], usage: Usage
) -> index_pb2.IndexServiceSearchResponse:
    return index_pb2.IndexServiceSearchResponse(
        hits=[codec.encode_hit(hit) for hit in hits], usage=codec.encode_usage(usage)
    )


def search_batch_arguments(
    request: index_pb2.SearchBatchRequest,
) -> tuple[np.ndarray, int, Filter | None]:
    """(vectors [Q, D] float32, k, filter)."""
    _check_count(request.vectors, "vectors", limits.MAX_SEARCH_VECTORS)
    _check_range(request.k, 1, limits.MAX_CANDIDATES, "k")
    if (hits := len(request.vectors) * request.k) > limits.MAX_SEARCH_HITS:
        raise InvalidInputError(
            f"{len(request.vectors)} vectors with k {request.k} may find {hits} hits: one call "
            f"answers at most {limits.MAX_SEARCH_HITS}. Send fewer vectors or a smaller k.",
            field="vectors",
            limit=limits.MAX_SEARCH_HITS,
        )
    vectors = codec.decode_vectors(request.vectors, "vectors")
    condition = (
        codec.decode_filter(request.filter, "filter") if request.HasField("filter") else None
    )
    return vectors, request.k, condition


def search_batch_response(
    found: Sequence[Sequence[Hit]], usage: Usage, *, ids_only: bool
) -> index_pb2.SearchBatchResponse:
    """Raises InvalidInputError when the hits do not fit into a message."""
    response = index_pb2.SearchBatchResponse(usage=codec.encode_usage(usage))
    for hits in found:
        result = response.results.add()
        if ids_only:
            codec.encode_bare_hits(hits, result)
        else:
            result.hits.extend(map(codec.encode_hit, hits))
    # Ids alone always fit: there are at most 16,384.
    if not ids_only and (size := response.ByteSize()) > limits.MAX_MESSAGE_BYTES:
        raise InvalidInputError(
            f"the hits of {len(found)} vectors are {size} bytes together, a message holds "
            f"{limits.MAX_MESSAGE_BYTES}: send fewer vectors, or set ids_only",
            field="vectors",
            reason="RESPONSE_TOO_LARGE",
            bytes=size,
        )
    return response


def content_hashes(request: index_pb2.FindReasoningsRequest) -> list[str]:
    _check_count(request.content_hashes, "content_hashes", limits.MAX_BATCH_ITEMS)
    for i, text in enumerate(request.content_hashes):
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise InvalidInputError(
                f"content_hashes[{i}] is {text[:70]!r}: expected 64 hexadecimal digits",
                field=f"content_hashes[{i}]",
            )
    return list(request.content_hashes)


def find_reasonings_response(
    found: Mapping[tuple[str, str], Reasoning],
) -> index_pb2.FindReasoningsResponse:
    """As many as fit into a message."""
    response = index_pb2.FindReasoningsResponse()
    left = limits.MAX_MESSAGE_BYTES
    for (content_hash, version), reasoning in found.items():
        one = index_pb2.ContentReasoning(
            content_hash=content_hash,
            reasoner_version=version,
            reasoning=codec.encode_reasoning(reasoning),
        )
        left -= one.ByteSize() + 8
        if left < 0:
            break
        response.reasonings.append(one)
    return response


def staged_vectors(request: index_pb2.StageVectorsRequest) -> list[StagedVector]:
    """The vectors of the request, one for each id."""
    return _batch(request.vectors, "vectors", _staged_vector)


def _staged_vector(message: index_pb2.StagedVector, at: str) -> StagedVector:
    return StagedVector(
        codec.check_id(message.id, f"{at}.id"),
        message.sequence,
        codec.decode_vector(message.vector, f"{at}.vector"),
    )


def pending_limit(request: index_pb2.ListPendingRequest) -> int:
    _check_range(request.limit, 1, limits.MAX_BATCH_ITEMS, "limit")
    return request.limit


def get_response(
    ids: Sequence[str], documents: Sequence[Document | None], *, omit_media: bool
) -> index_pb2.GetResponse:
    """`documents[i]` is that of `ids[i]`, None where it is unknown."""
    response = index_pb2.GetResponse(
        documents=[
            codec.encode_document(d, omit_media=omit_media) for d in documents if d is not None
        ],
        unknown_ids=[i for i, d in zip(ids, documents, strict=True) if d is None],
    )
    size = response.ByteSize()
    # One document that could be stored can be sent: beside its media there is room for the rest.
    if size > limits.MAX_MESSAGE_BYTES and len(ids) > 1:
        raise InvalidInputError(
            f"the {len(ids)} documents are {size} bytes together, a message holds "
            f"{limits.MAX_MESSAGE_BYTES}: ask for fewer ids, or set omit_media",
            field="ids",
            reason="RESPONSE_TOO_LARGE",
            bytes=size,
        )
    return response


def _batch(messages: Sequence[Any], at: str, decode: Callable[[Any, str], T]) -> list[T]:
    _check_count(messages, at, limits.MAX_BATCH_ITEMS)
    return [decode(message, f"{at}[{i}]") for i, message in enumerate(messages)]


def _check_count(items: Sequence[Any], at: str, limit: int) -> None:
    if not 1 <= len(items) <= limit:
        raise InvalidInputError(
            f"{at} has {len(items)} items: expected 1 to {limit}", field=at, limit=limit
        )


def _check_unset(value: Any, at: str, other: str) -> None:
    if value:
        raise InvalidInputError(
            f"both {at} and {other} are set: give one of them", field=other, reason="AMBIGUOUS"
        )


def _check_range(value: int, low: int, high: int, at: str) -> None:
    if not low <= value <= high:
        raise InvalidInputError(f"{at} is {value}: expected {low} to {high}", field=at, limit=high)


def _rerank_text(text: str, at: str, may_be_empty: bool = False) -> str:
    if not text.strip() and not may_be_empty:
        raise InvalidInputError(f"{at} is empty: give a text", field=at, reason="EMPTY_CONTENT")
    return codec.check_text(text, at, limits.MAX_REASONING_CHARS)
