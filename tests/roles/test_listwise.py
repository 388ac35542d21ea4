"""The listwise reranker: what it reads, what it makes of a reply, and its service."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servers import reranker as server
from servers import runtime
from servers.settings import Settings
from tests import compile_cache, tiny_models
from tte.v1 import reranker_pb2, reranker_pb2_grpc
from tte_jax.client import RemoteReranker
from tte_jax.engine.jobs import Generated
from tte_jax.errors import InvalidInputError, PreconditionError, UnsupportedError
from tte_jax.listwise import ListwiseReranker
from tte_jax.preprocess.prompts_list import parse_order
from tte_jax.stages import Order

TEXTS = ["a cat", "a dog", "the <think>red</think> thing"]
MOST = 4


@pytest.fixture(scope="module")
def directory() -> Path:
    """A text model whose prompts may be long: a vocabulary of 512 makes many tokens of a text."""
    return tiny_models.write_model(
        tiny_models.root() / "list",
        family="qwen3",
        roles=["reranker"],
        seed=2,
        buckets={"prefill": [[1, 640]], "decode": [[1, 704]], "new_tokens": 64},
    )


@pytest.fixture(scope="module")
def listwise(directory: Path):
    with ListwiseReranker.from_pretrained(directory, most=MOST) as role:
        yield role


def test_replies() -> None:
    assert parse_order("[3, 1, 2]", 3) == ([2, 0, 1], 3)
    assert parse_order("Best first: [2,3] is my order. [1]", 3) == ([1, 2, 0], 2)
    assert parse_order("[3, 1", 3) == ([2, 0, 1], 2)  # cut off by the budget
    assert parse_order("[2, 2, 9, 0, 1]", 3) == ([1, 0, 2], 2)
    assert parse_order('["2", "[1]"]', 3)[0][0] == 1
    for nothing in ("", "2, 1, 3", "[]", "[none]", "[99999999999999999999]"):
        assert parse_order(nothing, 3) == ([0, 1, 2], 0)


@given(st.text("[]0123456789, a\n"), st.integers(1, 12))
def test_every_reply_is_an_order(text: str, count: int) -> None:
    indices, ranked = parse_order(text, count)
    assert sorted(indices) == list(range(count)) and 0 <= ranked <= count
    assert indices[ranked:] == sorted(indices[ranked:])


def test_the_prompt_has_every_text_once_and_no_tags_of_theirs(listwise: ListwiseReranker) -> None:
    prompt = listwise.served.prompts.rerank_list("<think>q</think> Answer: a cat", TEXTS, "Judge.")
    assert "\n[1] a cat\n[2] a dog\n[3] red" in prompt.text
    assert prompt.text.count("<think>") == prompt.text.count("</think>") == 1
    assert "<Instruct>: Judge.\n" in prompt.text


def test_what_the_model_writes_is_read(listwise: ListwiseReranker, monkeypatch) -> None:
    """A tiny random model writes no list, so its reply is put in its mouth."""
    tokenizer, asked = listwise.served.prompts.tokenizer, []

    def submit(jobs, **kwargs):
        asked.extend(jobs)
        done: Future[Generated] = Future()
        tokens = tokenizer.encode_tagged("[3, 1]")
        done.set_result(Generated(tokens, False, cached_tokens=2, queue_s=0.5, compute_s=0.25))
        return [done]

    listwise.warmup()
    monkeypatch.setattr(listwise.loop, "submit", submit)
    order, usage = listwise.order("a cat", TEXTS)
    assert order == Order((2, 0, 1), 2)
    assert (usage.tokens_in, usage.tokens_out) == (
        len(listwise.served.prompts.rerank_list("a cat", TEXTS).ids),
        len(tokenizer.encode_tagged("[3, 1]")),
    )
    assert asked[0].max_tokens <= listwise.max_new_tokens


def test_a_real_reply_of_a_random_model_keeps_every_candidate(listwise: ListwiseReranker) -> None:
    order, usage = listwise.order("a cat", TEXTS)
    assert sorted(order.indices) == [0, 1, 2]
    assert 0 < usage.tokens_out <= listwise.max_new_tokens
    assert listwise.order("a cat", TEXTS)[0] == order  # greedy
    compiled = listwise.compile_count
    listwise.order("another", TEXTS * 1)
    assert listwise.compile_count == compiled


def test_what_it_does_not_take(listwise: ListwiseReranker, directory: Path) -> None:
    with pytest.raises(InvalidInputError, match="5 are more than the 4") as raised:
        listwise.order("a cat", ["a"] * 5)
    assert raised.value.field == "candidates"
    with pytest.raises(InvalidInputError, match="the query is empty"):
        listwise.order("  ", TEXTS)
    with pytest.raises(InvalidInputError, match="the list"):
        listwise.order("a cat", ["word " * 300, "b"])
    with pytest.raises(PreconditionError, match="order fewer candidates"):
        ListwiseReranker(listwise.served, most=60)


async def test_a_service_offers_it_when_told_to(directory: Path) -> None:
    async with serving(directory, listwise=MOST) as (address, service):
        remote = RemoteReranker(address)
        try:
            order, usage = await remote.order("a cat", TEXTS, timeout_s=60)
            assert sorted(order.indices) == [0, 1, 2] and usage.tokens_out > 0
            scores, _ = await remote.rerank("a cat", TEXTS, timeout_s=60)
            assert scores.shape == (3,)
            with pytest.raises(InvalidInputError, match="5 are more than the 4"):
                await remote.order("a cat", ["a"] * 5, timeout_s=60)
        finally:
            await remote.close()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = reranker_pb2_grpc.RerankerServiceStub(channel)
            info = await stub.Info(reranker_pb2.RerankerServiceInfoRequest())
        assert info.max_listwise_candidates == MOST
        metrics = service.metrics
        assert metrics["compile_count"]() == metrics["warm_compile_count"]()


async def test_a_service_that_was_not_says_so() -> None:
    async with serving(tiny_models.text_dir()) as (address, _):
        remote = RemoteReranker(address)
        try:
            with pytest.raises(UnsupportedError, match="--listwise N"):
                await remote.order("a cat", TEXTS, timeout_s=60)
        finally:
            await remote.close()


class serving:
    """A real reranker service; gives its address and the `Service`."""

    def __init__(self, directory: Path, *, listwise: int = 0) -> None:
        self.settings = Settings(
            service="reranker",
            port=0,
            grace_s=5.0,
            compile_cache=str(compile_cache.directory()),
            reranker_model=str(directory),
            listwise=listwise,
        )

    async def __aenter__(self) -> tuple[str, runtime.Service]:
        self.stop, made = asyncio.Event(), []
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def create(given: Settings) -> runtime.Service:
            made.append(await server.create(given))
            return made[0]

        self.task = asyncio.create_task(
            runtime.serve(self.settings, create, stop=self.stop, ready=port.set_result)
        )
        await asyncio.wait({self.task, port}, return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        return f"127.0.0.1:{port.result()}", made[0]

    async def __aexit__(self, *_) -> None:
        self.stop.set()
        await self.task
