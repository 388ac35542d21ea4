from __future__ import annotations

import pytest

from tests import tiny_models
from tte_jax.content import Content, Side, Task
from tte_jax.errors import InternalError, InvalidInputError, UnavailableError, UnsupportedError
from tte_jax.reasoner import Delta, Finished, Reasoner
from tte_jax.stages import ReasonItem

CAT = ReasonItem(Content.of("a cat"), Side.QUERY)
PICTURE = ReasonItem(Content.of("", tiny_models.png(41)), Side.DOCUMENT)


@pytest.fixture(scope="module")
def reasoner():
    return tiny_models.reasoner()


def test_streamed_texts_join_to_the_whole_reasoning(reasoner):
    texts, tokens, finished = ["", ""], [0, 0], {}
    for event in reasoner.stream([CAT, PICTURE], 24):
        match event:
            case Delta(index, text, count):
                assert index not in finished, "a delta after the result"
                texts[index] += text
                tokens[index] += count
            case Finished(index, reasoning, _):
                finished[index] = reasoning
    assert [finished[i].text for i in (0, 1)] == [t.strip() for t in texts]
    assert [finished[i].tokens for i in (0, 1)] == tokens
    assert [finished[0], finished[1]] == reasoner.reason([CAT, PICTURE], 24)


def test_usage_counts_tokens_and_cached_vision_features(reasoner):
    fresh = ReasonItem(Content.of("", tiny_models.png(42)), Side.DOCUMENT)
    (reasoning,), first = reasoner.run([fresh], 24)
    prompt = reasoner.served.prompts.reason(fresh)
    assert (first.stage, first.model_version) == ("reason", reasoner.version)
    assert (first.tokens_in, first.tokens_out) == (len(prompt.ids), reasoning.tokens)
    assert first.cached_tokens == 0 and first.compute_s > 0
    again, second = reasoner.run([fresh], 24)
    assert again == [reasoning]
    assert second.cached_tokens == 4  # 56 x 56 pixels: 16 patches, 4 tokens


def test_a_rewrite_reads_the_query_and_the_candidate(reasoner):
    def rewrite(query: str):
        return reasoner.prepare(
            ReasonItem(
                PICTURE.content,
                Side.DOCUMENT,
                task=Task.REWRITE,
                query=Content.of(query),
                candidate_reasoning="<think>cat</think>\nAnswer: cat",
            ),
            24,
        )

    assert rewrite("a dog").input.ids.tolist() != rewrite("a cat").input.ids.tolist()
    assert reasoner.submit([rewrite("a dog")])[0].result(60).reasoning.tokens > 0


def test_the_field_at_fault_is_named(reasoner):
    long = ReasonItem(Content.of("cat " * 100), Side.QUERY)
    with pytest.raises(InvalidInputError, match="at most 64") as caught:
        reasoner.reason([CAT, long], 24)
    assert caught.value.field == "inputs[1].content"
    assert (caught.value.reason, caught.value.metadata["limit"]) == ("TOO_LONG", "64")
    with pytest.raises(InvalidInputError) as caught:
        reasoner.reason([ReasonItem(Content(()), Side.QUERY)], 24)
    assert caught.value.field == "inputs[0].content"
    with pytest.raises(InvalidInputError) as caught:
        reasoner.reason([CAT, CAT, ReasonItem(Content.of("", b"no image"), Side.QUERY)], 24)
    assert caught.value.field == "inputs[2].content.parts[0].image.data"
    assert caught.value.reason == "UNREADABLE_IMAGE"


def test_a_text_model_refuses_images(tmp_path):
    directory = tiny_models.write_model(tmp_path / "m", family="qwen3", roles=["reasoner"])
    role = Reasoner.from_pretrained(directory)
    assert not role.accepts_media and tiny_models.reasoner().accepts_media
    with pytest.raises(UnsupportedError, match="text only"):
        role.prepare(PICTURE, 24)
    with pytest.raises(UnavailableError, match="warming up"):
        role.submit([role.prepare(CAT, 24)])
    role.close()
    with pytest.raises(UnavailableError):
        role.warmup()


def test_no_items_are_no_work(reasoner):
    assert reasoner.reason([], 24) == []
    assert list(reasoner.stream([], 24)) == []


def test_a_sequence_that_cannot_be_read_is_answered_with_an_error(reasoner, monkeypatch):
    def broken(ids):
        raise ValueError("no such token")

    job = reasoner.prepare(CAT, 24)
    monkeypatch.setattr(reasoner.served.prompts.tokenizer, "decode", broken)
    with pytest.raises(InternalError) as caught:
        reasoner.submit([job])[0].result(60)
    assert "no such token" not in caught.value.message
