"""The mining stream: order, flow control both ways, broken connections, refused queries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from servers.convert import mining_rules
from tests.training.mining.hand import HandReranker, reranker_service
from tte.v1 import reranker_pb2
from tte_jax.client import NegativeMiner, Refused
from tte_jax.errors import InternalError, InvalidInputError, UnavailableError


def request(number: int, candidate: str = "red crow") -> reranker_pb2.MineNegativesRequest:
    def text(id: str, words: str) -> reranker_pb2.MiningText:
        return reranker_pb2.MiningText(id=id, text=words)

    return reranker_pb2.MineNegativesRequest(
        query_id=str(number),
        query=f"red owl {number}",
        positive=text("p", f"owl {number} red"),
        candidates=[text("p", f"owl {number} red"), text("a", candidate), text("b", "blue")],
        rules=reranker_pb2.MiningRules(negatives=2),
    )


def drawn(count: int, taken: list[int]) -> Iterator[reranker_pb2.MineNegativesRequest]:
    for number in range(count):
        taken.append(number)
        yield request(number)


async def test_answers_come_in_order_with_their_scores():
    async with reranker_service(HandReranker()) as address:
        miner = NegativeMiner(address)
        assert await miner.version() == "hand@1"
        answers = [a async for a in miner.mine(drawn(20, []))]
        await miner.close()
    assert [a.query_id for a in answers] == [str(i) for i in range(20)]
    one = answers[7]
    assert one.positive_score == 1.0
    assert [(n.id, round(n.score, 5)) for n in one.negatives] == [("a", 0.33333), ("b", 0.0)]
    assert one.usage.model_version == "hand@1"


async def test_neither_side_runs_ahead():
    """A slow reader holds back the service and the source of the requests."""
    role, taken = HandReranker(), []
    async with reranker_service(role) as address:
        miner = NegativeMiner(address, window=4)
        answers = miner.mine(drawn(50, taken))
        for done in range(1, 6):
            await anext(answers)
            await asyncio.sleep(0.2)  # long enough for fifty queries
            # The one that is being looked at counts as not yet taken.
            assert len(taken) <= done - 1 + 4
            assert len(role.queries) <= done - 1 + 4
        assert len(taken) == 8
        assert len([a async for a in answers]) == 45
        await miner.close()
    assert taken == list(range(50))


async def test_a_broken_stream_goes_on_with_nothing_lost_or_twice():
    taken: list[int] = []
    answers: list[str] = []
    port = 0
    served = 0
    async with asyncio.timeout(60):
        miner = None
        stream = None
        for _ in range(4):
            role = HandReranker()
            async with reranker_service(role, port) as address:
                port = int(address.rpartition(":")[2])
                if miner is None:
                    miner = NegativeMiner(address, window=4, patience_s=30)
                    stream = miner.mine(drawn(40, taken))
                assert stream is not None
                for _ in range(9):
                    answers.append((await anext(stream)).query_id)
            # The server is gone in the middle of what it was sent; its successor takes the port.
            served += len(role.queries)
        async with reranker_service(HandReranker(), port):
            assert stream is not None and miner is not None
            answers += [a.query_id async for a in stream]
            await miner.close()
    assert answers == [str(i) for i in range(40)]
    assert taken == list(range(40))
    assert served >= 36


async def test_a_service_that_stays_away_is_not_waited_for_for_ever():
    async with reranker_service(HandReranker()) as address:
        miner = NegativeMiner(address, patience_s=0.5)
        stream = miner.mine(drawn(10, []))
        await anext(stream)
    with pytest.raises(UnavailableError, match="reranker at"):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError):
        await miner.version()
    await miner.close()


async def test_a_query_that_cannot_be_read_is_told_and_the_rest_goes_on():
    def requests() -> Iterator[reranker_pb2.MineNegativesRequest]:
        for number in range(6):
            yield request(number, "unreadable" if number in (2, 3) else "red crow")

    async with reranker_service(HandReranker()) as address:
        miner = NegativeMiner(address, window=3)
        answers = [a async for a in miner.mine(requests())]
        await miner.close()
    assert [a.query_id for a in answers] == list("012345")
    assert [isinstance(a, Refused) for a in answers] == [False, False, True, True, False, False]
    assert isinstance(answers[2], Refused)
    assert answers[2].error.field == "candidates[1].text"


async def test_an_error_in_the_requests_is_the_callers_own():
    def requests() -> Iterator[reranker_pb2.MineNegativesRequest]:
        yield request(0)
        raise ValueError("the file ended in the middle")

    async with reranker_service(HandReranker()) as address:
        miner = NegativeMiner(address)
        seen = []
        with pytest.raises(ValueError, match="middle"):
            async for answer in miner.mine(requests()):
                seen.append(answer.query_id)
        assert seen in ([], ["0"])
        await miner.close()
    with pytest.raises(InvalidInputError, match="window"):
        NegativeMiner("127.0.0.1:1", window=0)


async def test_another_querys_answer_is_a_defect(monkeypatch):
    from servers import convert

    made = convert.mined_response

    def wrong(request, *rest):
        answer = made(request, *rest)
        answer.query_id = "another"
        return answer

    monkeypatch.setattr(convert, "mined_response", wrong)
    async with reranker_service(HandReranker()) as address:
        miner = NegativeMiner(address)
        with pytest.raises(InternalError, match="'another', expected '0'"):
            async for _ in miner.mine([request(0)]):
                pass
        await miner.close()


def test_requests_carry_rules_that_the_service_takes():
    assert mining_rules(request(0).rules) == (1.0, 2)
