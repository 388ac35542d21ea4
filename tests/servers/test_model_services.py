"""The three model services: real grpc.aio servers over tiny real models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from servers import embedder as embedder_server
from servers import reasoner as reasoner_server
from servers import reranker as reranker_server
from servers import runtime
from servers.settings import Settings
from tests import compile_cache, tiny_models
from tests.servers.fake_services import listening
from tte.v1 import (
    content_pb2,
    embedder_pb2,
    embedder_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax import codec
from tte_jax.client.status import from_rpc_error
from tte_jax.content import Content, Side
from tte_jax.errors import NotFoundError, PreconditionError
from tte_jax.reasoner import Reasoner
from tte_jax.stages import EmbedItem, ReasonItem

QUERY, DOCUMENT = content_pb2.SIDE_QUERY, content_pb2.SIDE_DOCUMENT

SERVICES = {
    "reasoner": (reasoner_server, reasoner_pb2_grpc.ReasonerServiceStub, tiny_models.vl_dir),
    "embedder": (embedder_server, embedder_pb2_grpc.EmbedderServiceStub, tiny_models.vl_dir),
    "reranker": (reranker_server, reranker_pb2_grpc.RerankerServiceStub, tiny_models.text_dir),
}


@dataclass
class Running:
    stub: Any
    service: runtime.Service

    def metric(self, name: str) -> float:
        return self.service.metrics[name]()


def settings(service: str, directory: Path, **values: Any) -> Settings:
    return Settings(
        service=service,
        port=0,
        grace_s=5.0,
        compile_cache=str(compile_cache.directory()),
        **{f"{service}_model": str(directory)},
        **values,
    )


@contextlib.asynccontextmanager
async def running(service: str) -> AsyncIterator[Running]:
    module, stub, directory = SERVICES[service]
    stop, made = asyncio.Event(), []
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def create(given: Settings) -> runtime.Service:
        made.append(await module.create(given))
        return made[0]

    task = asyncio.create_task(
        runtime.serve(settings(service, directory()), create, stop=stop, ready=port.set_result)
    )
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.result()}") as channel:
            yield Running(stub(channel), made[0])
    finally:
        stop.set()
        await task


def content(text: str = "", *images: int) -> content_pb2.Content:
    parts = [content_pb2.Part(image=content_pb2.Image(data=tiny_models.png(i))) for i in images]
    return content_pb2.Content(parts=[*parts, *([content_pb2.Part(text=text)] if text else [])])


def violation(error: grpc.aio.AioRpcError) -> str:
    """The field path in the error's BadRequest."""
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    raise AssertionError(f"no BadRequest in {error}")


def reason_request(*inputs: reasoner_pb2.ReasonInput, **values: Any) -> reasoner_pb2.ReasonRequest:
    return reasoner_pb2.ReasonRequest(inputs=inputs, **values)


CAT = reasoner_pb2.ReasonInput(content=content("a cat"), side=QUERY)
PICTURE = reasoner_pb2.ReasonInput(content=content("", 41), side=DOCUMENT)


async def test_reason_streams_deltas_results_and_usage():
    async with running("reasoner") as r:
        request = reason_request(CAT, PICTURE, max_tokens=20)
        events = [e async for e in r.stub.Reason(request)]
        assert [e.WhichOneof("event") for e in events].count("usage") == 1
        assert events[-1].WhichOneof("event") == "usage"
        results = {e.result.input_index: e.result.reasoning for e in events if e.HasField("result")}
        expected = tiny_models.reasoner().reason(
            [
                ReasonItem(Content.of("a cat"), Side.QUERY),
                ReasonItem(Content.of("", tiny_models.png(41)), Side.DOCUMENT),
            ],
            20,
        )
        for index, reasoning in enumerate(expected):
            got = results[index]
            assert (got.text, got.answer, got.tokens) == (
                reasoning.text,
                reasoning.answer,
                reasoning.tokens,
            )
            assert got.truncated == reasoning.truncated
            own = [e.delta for e in events if e.HasField("delta") and e.delta.input_index == index]
            assert "".join(d.text for d in own).strip() == reasoning.text
            assert sum(d.tokens for d in own) == reasoning.tokens <= 20
        usage = events[-1].usage
        assert (usage.stage, usage.model_version) == ("reason", tiny_models.reasoner().version)
        assert usage.tokens_out == sum(x.tokens for x in expected)

        quiet = [e async for e in r.stub.Reason(reason_request(CAT, omit_deltas=True))]
        assert [e.WhichOneof("event") for e in quiet] == ["result", "usage"]

        rewrite = reasoner_pb2.ReasonInput(
            content=content("", 41),
            side=DOCUMENT,
            rewrite=reasoner_pb2.RewriteContext(query=content("a red cat")),
        )
        seen = [e async for e in r.stub.Reason(reason_request(rewrite, omit_deltas=True))]
        assert seen[0].result.reasoning.tokens > 0


async def test_a_unified_model_embeds_what_it_has_reasoned_about():
    async with running("reasoner") as r:
        plain = [e async for e in r.stub.Reason(reason_request(CAT, PICTURE, max_tokens=12))]
        request = reason_request(CAT, PICTURE, max_tokens=12, embed=True)
        events = [e async for e in r.stub.Reason(request)]
        told = (await r.stub.Info(reasoner_pb2.ReasonerServiceInfoRequest())).model
        assert r.metric("slots_embedded") == 2
    assert not any(e.result.HasField("embedding") for e in plain)
    assert events[-1].usage.tokens_out == plain[-1].usage.tokens_out
    results = {e.result.input_index: e.result for e in events if e.HasField("result")}
    texts = [results[i].reasoning.text for i in (0, 1)]
    vectors = tiny_models.embedder().embed(
        [
            EmbedItem(Content.of("a cat"), Side.QUERY, texts[0]),
            EmbedItem(Content.of("", tiny_models.png(41)), Side.DOCUMENT, texts[1]),
        ]
    )
    for i, vector in enumerate(vectors):
        got = codec.decode_embedding(results[i].embedding, "embedding")
        np.testing.assert_allclose(got.vector, vector, rtol=0, atol=1e-5)
        assert (got.usage.stage, got.usage.within) == ("embed", "reason")
        assert got.usage.model_version == tiny_models.embedder().version
        assert 0 < got.usage.cached_tokens < got.usage.tokens_in
    assert told.embeds_reasonings and told.dimension == len(vectors[0])


async def test_a_model_that_only_reasons_says_so(tmp_path):
    path = tiny_models.write_model(tmp_path / "m", family="qwen3", roles=["reasoner"])
    servicer = reasoner_server.ReasonerServicer(Reasoner.from_pretrained(path))
    async with (
        listening(
            lambda server: reasoner_pb2_grpc.add_ReasonerServiceServicer_to_server(servicer, server)
        ) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = reasoner_pb2_grpc.ReasonerServiceStub(channel)
        told = (await stub.Info(reasoner_pb2.ReasonerServiceInfoRequest())).model
        assert not told.embeds_reasonings and told.dimension == 0
        with pytest.raises(grpc.aio.AioRpcError, match="unified model") as caught:
            [e async for e in stub.Reason(reason_request(CAT, embed=True))]
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert from_rpc_error(caught.value, "it").reason == "NOT_UNIFIED"


async def test_drawn_reasonings_follow_their_seed_and_end_at_a_stop():
    async def text(stub: Any, **values: Any) -> str:
        request = reason_request(CAT, max_tokens=20, sampling=reasoner_pb2.Sampling(**values))
        events = [e async for e in stub.Reason(request)]
        return next(e.result.reasoning.text for e in events if e.HasField("result"))

    async with running("reasoner") as r:
        drawn = [await text(r.stub, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        greedy = await text(r.stub)
        stop = greedy[4:6]
        assert await text(r.stub, stop=[stop]) == greedy[: greedy.index(stop)].strip()


async def test_bad_reason_requests_are_refused_with_their_field():
    async with running("reasoner") as r:
        broken = content_pb2.Content(
            parts=[content_pb2.Part(image=content_pb2.Image(data=b"not an image"))]
        )
        cases = [
            (reason_request(), "inputs"),
            (reason_request(CAT, max_tokens=0), "max_tokens"),
            (
                reason_request(CAT, reasoner_pb2.ReasonInput(content=content(), side=QUERY)),
                "inputs[1].content",
            ),
            (
                reason_request(CAT, reasoner_pb2.ReasonInput(content=broken, side=QUERY)),
                "inputs[1].content.parts[0].image.data",
            ),
            (
                reason_request(reasoner_pb2.ReasonInput(content=content("cat " * 200), side=QUERY)),
                "inputs[0].content",
            ),
        ]
        for request, field in cases:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [e async for e in r.stub.Reason(request)]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert violation(caught.value).startswith(field)


async def test_a_cancelled_call_frees_its_slots():
    async with running("reasoner") as r:
        for _ in range(10):
            call = r.stub.Reason(reason_request(CAT, PICTURE, max_tokens=24))
            await call.read()
            call.cancel()
        # All slots answer again, and nothing of the cancelled calls is left.
        events = [e async for e in r.stub.Reason(reason_request(*[CAT] * 8, omit_deltas=True))]
        assert len(events) == 9
        assert r.metric("active_slots") == 0
        assert r.metric("queue_depth") == 0


async def test_embed_answers_as_the_role_does():
    async with running("embedder") as r:
        inputs = [
            embedder_pb2.EmbedInput(content=content("a cat"), side=QUERY, reasoning="cat"),
            embedder_pb2.EmbedInput(content=content("", 7), side=DOCUMENT),
        ]
        answer = await r.stub.Embed(embedder_pb2.EmbedRequest(inputs=inputs, dimension=16))
        vectors = np.stack([np.frombuffer(v.data, "<f4") for v in answer.embeddings])
        expected = tiny_models.embedder().embed(
            [
                EmbedItem(Content.of("a cat"), Side.QUERY, "cat"),
                EmbedItem(Content.of("", tiny_models.png(7)), Side.DOCUMENT),
            ],
            16,
        )
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert answer.usage.stage == "embed" and answer.usage.tokens_in > 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await r.stub.Embed(embedder_pb2.EmbedRequest(inputs=inputs, dimension=65))
        assert violation(caught.value) == "dimension"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await r.stub.Embed(embedder_pb2.EmbedRequest(inputs=inputs), timeout=1e-6)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_info_tells_the_model_and_that_requests_compile_nothing():
    async with running("embedder") as r:
        before = (await r.stub.Info(embedder_pb2.EmbedderServiceInfoRequest())).model
        one = embedder_pb2.EmbedInput(content=content("a cat", 3), side=QUERY)
        for count in (1, 2, 3, 5, 9):
            await r.stub.Embed(embedder_pb2.EmbedRequest(inputs=[one] * count))
        after = (await r.stub.Info(embedder_pb2.EmbedderServiceInfoRequest())).model
        assert after.model_name == "tiny-qwen2_vl"
        assert after.model_version == tiny_models.embedder().version
        assert (after.architecture, after.dtype) == ("qwen2_vl", "float32")
        assert (after.dimension, after.max_sequence_tokens) == (64, 64)
        assert after.accepts_media
        assert after.queue_capacity > after.queue_depth == 0
        assert after.compile_count == before.compile_count == after.warm_compile_count > 0
        assert r.metric("compile_count") == after.compile_count


async def test_rerank_scores_in_the_order_of_the_request():
    async with running("reranker") as r:
        candidates = ["a dog", "a cat", "", "the thing"]
        answer = await r.stub.Rerank(
            reranker_pb2.RerankRequest(query="a cat", candidates=candidates)
        )
        expected = tiny_models.reranker().score("a cat", candidates)
        np.testing.assert_allclose(answer.scores, expected, atol=1e-6)
        assert answer.usage.cached_tokens > 0
        for request, field in [
            (reranker_pb2.RerankRequest(query=" ", candidates=["a"]), "query"),
            (reranker_pb2.RerankRequest(query="a"), "candidates"),
            (
                reranker_pb2.RerankRequest(query="a", candidates=["a", "cat " * 100]),
                "candidates[1]",
            ),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await r.stub.Rerank(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert violation(caught.value) == field


def mining_request(query_id: str, **values: Any) -> reranker_pb2.MineNegativesRequest:
    texts = ["a cat", "a dog", "the thing", "red", "a smiling face", "dark skin"]
    return reranker_pb2.MineNegativesRequest(
        query_id=query_id,
        query="a cat",
        positive=reranker_pb2.MiningText(id="d0", text=texts[0]),
        candidates=[reranker_pb2.MiningText(id=f"d{i}", text=t) for i, t in enumerate(texts)],
        **values,
    )


async def test_mining_answers_query_by_query_with_the_rules_in_force():
    async with running("reranker") as r:
        call = r.stub.MineNegatives()
        texts = [c.text for c in mining_request("").candidates]
        scores = tiny_models.reranker().score("a cat", texts)
        strict = reranker_pb2.MiningRules(percent_of_positive=0.9, negatives=2)
        for query_id, rules, percent, count in [
            ("q1", None, 1.0, 7),
            ("q2", strict, 0.9, 2),
            ("q3", None, 0.9, 2),  # the rules of the message before
        ]:
            request = mining_request(query_id)
            if rules:
                request.rules.CopyFrom(rules)
            await call.write(request)
            answer = await call.read()  # before the next request is sent
            assert answer.query_id == query_id
            assert answer.positive_score == pytest.approx(scores[0], abs=1e-6)
            order = sorted(range(1, 6), key=lambda i: -scores[i])
            below = [i for i in order if scores[i] < percent * scores[0]][:count]
            above = [i for i in order if scores[i] >= percent * scores[0]]
            assert [n.candidate_index for n in answer.negatives] == below
            assert [n.candidate_index for n in answer.false_negatives] == above
            assert [n.id for n in answer.negatives] == [f"d{i}" for i in below]
            for mined in (*answer.negatives, *answer.false_negatives):
                assert mined.score == pytest.approx(scores[mined.candidate_index], abs=1e-6)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_bad_mining_request_ends_the_stream_after_the_good_ones():
    async with running("reranker") as r:
        call = r.stub.MineNegatives()
        await call.write(mining_request("good"))
        assert (await call.read()).query_id == "good"
        bad = mining_request("bad")
        bad.candidates[2].text = "cat " * 100
        await call.write(bad)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert violation(caught.value) == "candidates[2].text"


async def test_a_model_that_is_not_there_or_of_another_role(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        await embedder_server.create(settings("embedder", tmp_path / "nowhere"))
    with pytest.raises(PreconditionError, match="not for embedder"):
        await embedder_server.create(settings("embedder", tiny_models.text_dir()))
