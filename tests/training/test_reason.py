"""ECRs through a ReasonerService: both arms, keyed by content, resumed."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest

from servers import convert
from servers.reasoner import ReasonerServicer
from tests import tiny_models
from tests.servers.fake_services import listening
from tests.training.test_data_sources import write_jsonl
from training import reason
from training.data.ecrs import PLAIN, TRUTH, EcrStore, WithEcrs
from training.data.jsonl import JsonlSource
from tte.v1 import model_pb2, reasoner_pb2, reasoner_pb2_grpc
from tte_jax.content import Reasoning, Side, Usage
from tte_jax.errors import InternalError, InvalidInputError, PreconditionError


class Repeater(reasoner_pb2_grpc.ReasonerServiceServicer):
    """Says what it was shown: side, instruction, text. Refuses "bad"; `stop_after` calls, fails."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.version, self.stop_after = "repeater@1", stop_after
        self.asked: list[str] = []

    async def Reason(self, request, context):
        items, *_ = convert.reason_arguments(request)
        if self.stop_after == 0:
            raise RuntimeError("the machine went down")
        self.stop_after -= 1
        for i, item in enumerate(items):
            if "bad" in item.content.text:
                raise InvalidInputError("cannot be read", field=f"inputs[{i}].content")
        for i, item in enumerate(items):
            said = f"{item.side.value}|{item.instruction}|{item.content.text}"
            self.asked.append(said)
            yield convert.reason_result(i, Reasoning(said, "", said))
        yield convert.reason_usage(Usage("reason", model_version=self.version))

    async def Info(self, request, context):
        about = model_pb2.ModelInfo(model_version=self.version)
        return reasoner_pb2.ReasonerServiceInfoResponse(model=about)


@asynccontextmanager
async def serving(servicer):
    add = reasoner_pb2_grpc.add_ReasonerServiceServicer_to_server
    async with listening(lambda server: add(servicer, server)) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "owl.png").write_bytes(tiny_models.png(1))
    (tmp_path / "hawk.png").write_bytes(tiny_models.png(2))
    owl = {"images": ["owl.png"], "ecr": "<think>round eyes</think>\nAnswer: an owl"}
    rows = [
        {"query": {"text": f"bird {i}", "instruction": "Find it."}, "positives": [owl, "a label"],
         "negatives": [{"images": ["hawk.png"]}]}
        for i in range(5)
    ]  # fmt: skip
    return JsonlSource(write_jsonl(tmp_path / "birds.jsonl", rows))


def config(tmp_path, address, **changed) -> reason.Config:
    return reason.Config(data="", out=tmp_path / "ecrs", reasoner=address, **changed)


async def test_what_is_there_is_not_asked_again(tmp_path, source):
    teacher = Repeater(stop_after=2)
    async with serving(teacher) as address:
        asked = config(tmp_path, address, batch=2, budget=9)
        with pytest.raises(InternalError, match="incident"):
            await reason.run(asked, source=source)
        before = (tmp_path / "ecrs/no-ground-truth.jsonl").read_bytes()
        assert before.count(b"\n") == 4
        teacher.stop_after = 100
        done = await reason.run(asked, source=source)
    assert (done.written, done.known, done.refused, done.empty) == (3, 4, 0, 0)
    # Five queries and two pictures, each once; labels are left out.
    assert len(teacher.asked) == 7
    assert sorted(teacher.asked)[:2] == ["document||"] * 2
    lines = done.path.read_bytes()
    assert lines.startswith(before)
    assert {json.loads(line)["arm"] for line in lines.splitlines()} == {PLAIN}
    told = WithEcrs(source, EcrStore(done.path))
    assert told[3].query.ecr == "query|Find it.|bird 3"
    assert told[3].positives[0].ecr == "document||"
    assert told[3].positives[1].ecr == "" and told[3].negatives[0].ecr == "document||"
    async with serving(teacher) as address:
        with pytest.raises(InvalidInputError, match="another file"):
            await reason.run(config(tmp_path, address, budget=10), source=source)


async def test_arms_are_kept_apart(tmp_path, source):
    async with serving(Repeater()) as address:
        plain = await reason.run(config(tmp_path, address), source=source)
        truth = await reason.run(config(tmp_path, address, arm=TRUTH), source=source)
    assert {p.name for p in (tmp_path / "ecrs").iterdir()} == {
        "no-ground-truth.jsonl", "ground-truth.jsonl",
    }  # fmt: skip
    assert EcrStore(truth.path).arm == TRUTH and EcrStore(plain.path).arm == PLAIN
    query = WithEcrs(source, EcrStore(truth.path))[0].query.ecr
    assert query.startswith("query|Find it. The right result is known: an owl.")
    # The picture answers five queries, and is reasoned about in the light of each.
    told = [e for e in EcrStore(truth.path).shown_truth().values()]
    assert truth.written == 5 + 5 and len(told) == 6
    assert not any("right result" in line for line in plain.path.read_text().splitlines())


async def test_refused_inputs_are_left_out(tmp_path):
    rows = [{"query": q, "positives": ["x"]} for q in ("a", "bad 1", "b", "bad 2", "c")]
    source = JsonlSource(write_jsonl(tmp_path / "r.jsonl", rows))
    async with serving(Repeater()) as address:
        done = await reason.run(config(tmp_path, address), source=source)
    assert (done.written, done.refused) == (3, 2)


async def test_a_query_without_ground_truth_in_words(tmp_path):
    (tmp_path / "owl.png").write_bytes(tiny_models.png(1))
    rows = [{"query": "a", "positives": [{"images": ["owl.png"]}]}]
    source = JsonlSource(write_jsonl(tmp_path / "r.jsonl", rows))
    async with serving(Repeater()) as address:
        with pytest.raises(InvalidInputError, match="no ground truth in words"):
            await reason.run(config(tmp_path, address, arm=TRUTH), source=source)


async def test_another_model_half_way(tmp_path, source):
    teacher = Repeater()
    async with serving(teacher) as address:
        done = await reason.run(config(tmp_path, address, sides="query"), source=source)
        assert done.written == 5
        teacher.version = "repeater@2"
        with pytest.raises(InvalidInputError, match="repeater@1"):
            await reason.run(config(tmp_path, address), source=source)


async def test_a_real_reasoner_and_prompts_without_room_for_the_truth(tmp_path, source):
    """The mini prompts carry no instruction; an arm that only bears another name is refused."""
    async with serving(ReasonerServicer(tiny_models.reasoner())) as address:
        asked = config(tmp_path, address, budget=8, sides="query")
        done = await reason.run(asked, source=source)
        assert done.written == 5
        (model,) = {json.loads(line)["model"] for line in done.path.read_text().splitlines()}
        assert model == tiny_models.reasoner().version
        with pytest.raises(PreconditionError, match="no instruction") as raised:
            truth = config(tmp_path, address, budget=8, sides="query", arm=TRUTH)
            await reason.run(truth, source=source)
    assert raised.value.reason == "GROUND_TRUTH_IGNORED"
    assert WithEcrs(source, EcrStore(done.path))._with(source[0].query, Side.QUERY).ecr
