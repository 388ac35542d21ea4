"""Requests become the roles' arguments; what exceeds a limit names its field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servers import convert
from servers.runtime import SERVER_OPTIONS
from tte.v1 import content_pb2, embedder_pb2, index_pb2, reasoner_pb2, reranker_pb2
from tte_jax import codec, limits
from tte_jax.content import Content, Document, Reasoning, Side, Usage
from tte_jax.errors import InvalidInputError
from tte_jax.mining import percent_of_positive
from tte_jax.stages import GREEDY, EmbedItem, Hit, IndexEntry, ReasonItem, Sampling

few = settings(max_examples=30, deadline=None)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(str.strip)


def sampled(**values: Any) -> reasoner_pb2.ReasonRequest:
    return reasoner_pb2.ReasonRequest(
        inputs=[reason_input()], sampling=reasoner_pb2.Sampling(**values)
    )


def reason_input() -> reasoner_pb2.ReasonInput:
    return codec.encode_reason_item(ReasonItem(Content.of("cat"), Side.QUERY))


@few
@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 4096))
def test_reason_requests(words: list[str], tokens: int) -> None:
    items = [ReasonItem(Content.of(word), Side.DOCUMENT) for word in words]
    request = reasoner_pb2.ReasonRequest(
        inputs=map(codec.encode_reason_item, items), max_tokens=tokens
    )
    assert convert.reason_arguments(request) == (items, tokens, GREEDY)
    request.ClearField("max_tokens")
    assert convert.reason_arguments(request)[1] == 64


def test_sampling_travels_and_is_greedy_by_default() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.25, seed=7, stop=("\n", "Answer"))
    assert codec.decode_sampling(codec.encode_sampling(sampling)) == sampling
    assert convert.reason_arguments(sampled(temperature=0.5))[2] == Sampling(temperature=0.5)


def test_reason_responses_carry_one_event_each() -> None:
    delta = convert.reason_delta(2, "ab", 1)
    result = convert.reason_result(2, Reasoning("abc", "a", "c", 3, True))
    usage = convert.reason_usage(Usage("reason", tokens_out=3))
    assert [m.WhichOneof("event") for m in (delta, result, usage)] == ["delta", "result", "usage"]
    assert (delta.delta.input_index, delta.delta.text, delta.delta.tokens) == (2, "ab", 1)
    assert codec.decode_reasoning(result.result.reasoning) == Reasoning("abc", "a", "c", 3, True)
    assert codec.decode_usage(usage.usage) == Usage("reason", tokens_out=3)


@few
@given(st.lists(texts, min_size=1, max_size=5), st.integers(0, 8192))
def test_embed_requests(words: list[str], dimension: int) -> None:
    items = [EmbedItem(Content.of(word), Side.QUERY, word, "find") for word in words]
    request = embedder_pb2.EmbedRequest(
        inputs=map(codec.encode_embed_item, items), dimension=dimension
    )
    assert convert.embed_arguments(request) == (items, dimension)


def test_embed_responses_keep_rows_in_order() -> None:
    rows = np.float32([[1, 2], [3, 4]])
    response = convert.embed_response(rows, Usage("embed"))
    assert [codec.decode_vector(v, "v").tolist() for v in response.embeddings] == rows.tolist()


@few
@given(texts, st.lists(st.just("") | texts, min_size=1, max_size=5), texts)
def test_rerank_requests(query: str, candidates: list[str], instruction: str) -> None:
    request = reranker_pb2.RerankRequest(
        query=query, candidates=candidates, instruction=instruction
    )
    assert convert.rerank_arguments(request) == (query, candidates, instruction)


def test_rerank_requests_with_contents() -> None:
    query, candidates = Content.of("a", b"png"), [Content.of("", b"jpeg"), Content.of("text")]
    request = reranker_pb2.RerankRequest(
        query_content=codec.encode_content(query),
        candidate_contents=map(codec.encode_content, candidates),
    )
    assert convert.rerank_arguments(request) == (query, candidates, "")


def test_mining_scores_the_positive_first_and_answers_with_document_ids() -> None:
    request = reranker_pb2.MineNegativesRequest(query_id="q1", query="cat")
    request.positive.id, request.positive.text = "p", "a cat"
    for name in ("easy", "false", "hard"):
        request.candidates.add(id=name, text=f"{name} text")
    query, scored, instruction = convert.mining_texts(request)
    assert (query, instruction) == ("cat", "")
    assert scored == ["a cat", "easy text", "false text", "hard text"]
    scores = np.float32([0.5, 0.125, 0.75, 0.25])
    percent, count = convert.mining_rules(request.rules)
    mined = percent_of_positive(scores[1:], scores[0], threshold=percent, hardest=count)
    answer = convert.mined_response(request, scores, mined, Usage("rerank"))
    assert (answer.query_id, answer.positive_score) == ("q1", 0.5)
    assert [(n.id, n.score, n.candidate_index) for n in answer.negatives] == [
        ("hard", 0.25, 2),
        ("easy", 0.125, 0),
    ]
    assert [n.id for n in answer.false_negatives] == ["false"]


def entry(name: str) -> index_pb2.IndexEntry:
    document = Document(name, Content.of("cat"), {"n": 1})
    return codec.encode_entry(IndexEntry(document, np.float32([1, 0])))


def test_index_requests() -> None:
    entries = convert.upsert_entries(index_pb2.UpsertRequest(entries=[entry("a"), entry("b")]))
    assert [e.document.id for e in entries] == ["a", "b"]
    search = index_pb2.IndexServiceSearchRequest(k=3, vector=entry("a").vector)
    vector, k, condition = convert.index_search_arguments(search)
    assert (vector.tolist(), k, condition) == ([1, 0], 3, None)
    hits = convert.index_search_response([Hit("a", 0.5)], Usage("index")).hits
    assert [(h.id, h.cosine) for h in hits] == [("a", 0.5)]


def test_get_lists_unknown_ids_and_can_leave_media_out() -> None:
    document = Document("a", Content.of("cat", b"image"))
    full = convert.get_response(["a", "x"], [document, None], omit_media=False)
    slim = convert.get_response(["a", "x"], [document, None], omit_media=True)
    assert list(full.unknown_ids) == list(slim.unknown_ids) == ["x"]
    assert codec.decode_document(full.documents[0], "d") == document
    assert [p.WhichOneof("kind") for p in slim.documents[0].content.parts] == ["text"]


def test_documents_too_large_for_a_message_are_refused_before_gRPC_does() -> None:
    large = Document("a", Content.of("", b"x" * (limits.MAX_MESSAGE_BYTES // 2)))
    room = dict(SERVER_OPTIONS)["grpc.max_send_message_length"]
    with pytest.raises(InvalidInputError) as caught:
        convert.get_response(["a", "b"], [large, large], omit_media=False)
    assert caught.value.reason == "RESPONSE_TOO_LARGE"
    # One that could be stored can be read, with what stands beside its media.
    largest = Document("a", Content.of("cat", b"x" * limits.MAX_MESSAGE_BYTES), {"n": "1" * 999})
    assert convert.get_response(["a"], [largest], omit_media=False).ByteSize() < room
    assert not convert.get_response(["a"], [large], omit_media=True).documents[0].content.parts


def embed(**change) -> embedder_pb2.EmbedRequest:
    item = codec.encode_embed_item(EmbedItem(Content.of("cat"), Side.QUERY))
    return embedder_pb2.EmbedRequest(**{"inputs": [item], **change})


def rerank(**change) -> reranker_pb2.RerankRequest:
    return reranker_pb2.RerankRequest(**{"query": "q", "candidates": ["c"], **change})


def mine(**change) -> reranker_pb2.MineNegativesRequest:
    text = reranker_pb2.MiningText(id="p", text="t")
    good = {"query_id": "q", "query": "q", "positive": text, "candidates": [text]}
    return reranker_pb2.MineNegativesRequest(**{**good, **change})


def cat() -> content_pb2.Content:
    return codec.encode_content(Content.of("cat"))


def nameless() -> content_pb2.Content:
    return content_pb2.Content(parts=[content_pb2.Part()])


@pytest.mark.parametrize(
    ("read", "request_", "field"),
    [
        (convert.reason_arguments, reasoner_pb2.ReasonRequest(), "inputs"),
        (
            convert.reason_arguments,
            reasoner_pb2.ReasonRequest(inputs=[reason_input()], max_tokens=0),
            "max_tokens",
        ),
        (
            convert.reason_arguments,
            reasoner_pb2.ReasonRequest(inputs=[reason_input()] * 65),
            "inputs",
        ),
        (convert.reason_arguments, sampled(temperature=2.5), "sampling.temperature"),
        (convert.reason_arguments, sampled(top_p=0.0), "sampling.top_p"),
        (convert.reason_arguments, sampled(stop=["a"] * 5), "sampling.stop"),
        (convert.reason_arguments, sampled(stop=[""]), "sampling.stop"),
        (convert.embed_arguments, embed(dimension=8_193), "dimension"),
        (
            convert.embed_arguments,
            embed(inputs=[embedder_pb2.EmbedInput(content=nameless())]),
            "inputs[0].content.parts[0]",
        ),
        (convert.rerank_arguments, rerank(query_content=cat()), "query_content"),
        (convert.rerank_arguments, rerank(candidate_contents=[cat()]), "candidate_contents"),
        (
            convert.rerank_arguments,
            rerank(query="", query_content=nameless()),
            "query_content.parts[0]",
        ),
        (convert.rerank_arguments, rerank(query=" "), "query"),
        (convert.rerank_arguments, rerank(candidates=[]), "candidates"),
        (convert.rerank_arguments, rerank(candidates=["c"] * 257), "candidates"),
        (convert.rerank_arguments, rerank(candidates=["c", "x" * 32_769]), "candidates[1]"),
        (convert.mining_texts, mine(query_id=""), "query_id"),
        (convert.mining_texts, mine(positive=None), "positive.text"),
        (
            convert.mining_rules,
            reranker_pb2.MiningRules(percent_of_positive=0),
            "rules.percent_of_positive",
        ),
        (convert.mining_rules, reranker_pb2.MiningRules(negatives=0), "rules.negatives"),
        (
            convert.upsert_entries,
            index_pb2.UpsertRequest(entries=[entry("a"), entry("a")]),
            "entries[1].document.id",
        ),
        (
            convert.index_search_arguments,
            index_pb2.IndexServiceSearchRequest(vector=entry("a").vector),
            "k",
        ),
        (lambda ids: convert.document_ids(ids, 64), ["a", ""], "ids[1]"),
        (lambda ids: convert.document_ids(ids, 64), ["a"] * 65, "ids"),
    ],
)
def test_bad_requests_name_their_field(read, request_, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(request_)
    assert caught.value.field == field
