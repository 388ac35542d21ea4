"""The search benchmark against a real gateway and index with models of known answers."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from benchmarks import environment, search
from benchmarks.queries import KINDS, Question, draw
from tests.cli.system import System
from tte_jax.client import Client
from tte_jax.content import Content, Document
from tte_jax.errors import InvalidInputError


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    running = System(tmp_path_factory.mktemp("system"))
    with Client(running.addresses["gateway"]) as client:
        documents = [Document(c, Content.of("", png(c))) for c in ("red", "blue", "green")]
        assert list(client.ingest(documents))[-1].stored == 3
    yield running.addresses
    running.stop()


def test_questions_differ_take_turns_and_are_the_same_again() -> None:
    drawn = draw(60)
    assert [q.kind for q in drawn[:6]] == [*KINDS, *KINDS]
    assert len({q.content.content_hash for q in drawn}) == 60
    assert drawn == draw(60) != draw(60, seed=1)
    for question in drawn[:3]:
        has = (bool(question.content.text), len(question.content.media))
        assert (
            has
            == {"text": (True, 0), "image": (False, 1), "image + change": (True, 1)}[question.kind]
        )


def test_every_question_is_asked_once_whatever_the_number_of_clients(
    addresses: dict[str, str],
) -> None:
    questions = [Question("text", Content.of(f"red {n}")) for n in range(9)]
    samples, seconds = search.measure(
        addresses["gateway"], questions, clients=3, top_k=3, timeout_s=30
    )
    assert sorted(s.last.query_reasoning.think for s in samples) == sorted(
        q.content.text for q in questions
    )
    assert all(s.whole and 0 < s.first_s <= s.final_s <= seconds for s in samples)


def test_a_clients_error_is_the_measurements(addresses: dict[str, str]) -> None:
    questions = [Question("text", Content.of("poison"))] * 3
    with pytest.raises(InvalidInputError, match="poison"):
        search.measure(addresses["gateway"], questions, clients=2, top_k=3, timeout_s=30)


def test_the_result_has_every_stage_of_every_kind(
    addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "foreign_load", lambda: 0.5)
    config = search.Config(queries=3, clients=(1, 2), warm=1, top_k=2)
    result = search.run(config, addresses)
    assert result["noisy"] and result["system"]["index"]["documents"] == 3
    assert result["compile_counts"]["during"] == {"reasoner": 0, "embedder": 0, "reranker": 0}
    for load in result["clients"].values():
        assert set(load["kinds"]) == set(KINDS) and load["all"]["queries"] == 3
        assert {"reason", "embed", "index", "rerank"} <= set(load["all"]["stages"])
        assert load["all"]["not_whole"] == 0 and load["queries_per_s"] > 0


def test_spread_of_known_times() -> None:
    assert search.spread([0.001 * n for n in range(1, 102)]) == {
        "p50_ms": 51.0, "p95_ms": 96.0, "mean_ms": 51.0,
    }  # fmt: skip
