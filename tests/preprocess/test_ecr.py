from __future__ import annotations

import pytest

from tte_jax.content import NO_REASONING, Reasoning
from tte_jax.preprocess.ecr import cut_words, parse_ecr, plain


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>round, smiling</think>\nAnswer: grinning cat", "round, smiling", "grinning cat"),
        ("<think>\n cues \n</think>\n\nSummary: a page\n", "cues", "a page"),
        ("cues</think>\nAnswer: cat<|im_end|>", "cues", "cat"),
        ("<think>cues</think>cat", "cues", "cat"),
        ("<think>cues</think>\n**Answer:** **cat**", "cues", "cat"),
        ("<think>cues</think>\nANSWER :\ncat\nand more", "cues", "cat"),
        ("<think>the Answer: is not here</think>\nAnswer: cat", "the Answer: is not here", "cat"),
        ("<think>cues\nAnswer: cat", "cues", "cat"),
        ("<think>cues Answer: cat", "cues", "cat"),
        ("<think>cut in the mid", "cut in the mid", ""),
        ("cues.\nAnswer: cat", "cues.", "cat"),
        ("Answer: a: b", "", "a: b"),
        ("just a cat", "", "just a cat"),
        ("<think></think>\nAnswer: cat", "", "cat"),
        ("<think>a</think>b</think>\nAnswer: cat", "ab", "cat"),
        ("<think>unanswered: no label</think>\nmy cat", "unanswered: no label", "my cat"),
        ("", "", ""),
    ],
)
def test_parse(text: str, think: str, answer: str) -> None:
    parsed = parse_ecr(text, tokens=7, truncated=True)
    assert (parsed.think, parsed.answer) == (think, answer)
    assert (parsed.tokens, parsed.truncated) == (7, True)


def test_text_stays_whole_but_for_control_tokens() -> None:
    text = "<think>cues</think>\nAnswer: cat"
    assert parse_ecr(f" {text}<|im_end|>\n").text == text


def test_plain() -> None:
    def made(think: str, answer: str) -> str:
        return plain(Reasoning(text="x", think=think, answer=answer))

    assert made("round,\n smiling", "cat") == "round, smiling. Answer: cat"
    assert made("A cat.", "cat") == "A cat. Answer: cat"
    assert made("", "cat") == "Answer: cat"
    assert made("cues", "") == "cues"
    assert plain(NO_REASONING) == ""


def test_cut_words() -> None:
    assert cut_words("a  b\nc d", 3) == "a  b\nc"
    assert cut_words(" a b ", 2) == " a b"
    assert cut_words("a b", 3) == "a b"
    assert len(cut_words("w " * 600).split()) == 500
