"""Embedding-centric reasonings (ECR): what the reasoner writes, taken apart.

The form is `<think>` cues `</think>`, a new line, `Answer: ` or `Summary: ` and one line. Models
forget parts of it, so the parser takes whatever there is.
"""

from __future__ import annotations

import re

from tte_jax.content import Reasoning

THINK, END_THINK = "<think>", "</think>"
MAX_WORDS = 500
"""How many words of an ECR the embedder reads; a few teacher ECRs run to thousands."""

_CONTROL = re.compile(r"<\|[a-z_]+\|>")
# A label may stand in the middle of a line when the model forgot the line break before it.
_LABEL = re.compile(r"(?:^|(?<=\s))\**(?:answer|summary)\**\s*:\**", re.IGNORECASE)


def parse_ecr(text: str, tokens: int = 0, truncated: bool = False) -> Reasoning:
    """Take a generated ECR apart, tolerating missing tags and labels.

    - No `<think>`: the thinking starts at the beginning (the prompt may have opened it).
    - No `</think>`: the thinking ends at the last label, else with the text.
    - No label after `</think>`: what follows the tag is the answer.
    - Neither tags nor label: the text is an answer without thinking.

    Args:
      text: as generated; control tokens such as `<|im_end|>` are removed.
      tokens: how many tokens were generated, passed through.
      truncated: whether the budget closed the think block, passed through.
    """
    text = _CONTROL.sub("", text).strip()
    head, closed, tail = text.rpartition(END_THINK)
    if closed:
        think, answer = head, tail
        labels = list(_LABEL.finditer(tail))
        if labels:
            answer = tail[labels[0].end() :]
    else:
        labels = list(_LABEL.finditer(text))
        if labels:
            think, answer = text[: labels[-1].start()], text[labels[-1].end() :]
        elif THINK in text:
            think, answer = text, ""
        else:
            think, answer = "", text
    think = think.partition(THINK)[2] if THINK in think else think
    return Reasoning(
        text=text,
        think=think.replace(THINK, "").replace(END_THINK, "").strip(),
        answer=_one_line(answer),
        tokens=tokens,
        truncated=truncated,
    )


def cut_words(text: str, limit: int = MAX_WORDS) -> str:
    """The first `limit` words, white space between them as it was."""
    for count, word in enumerate(re.finditer(r"\S+", text), start=1):
        if count == limit:
            return text[: word.end()]
    return text


def plain(reasoning: Reasoning) -> str:
    """The ECR without tags, as the reranker reads it: `cues. Answer: label`."""
    think = " ".join(reasoning.think.split())
    if not reasoning.answer:
        return think
    answer = f"Answer: {reasoning.answer}"
    if not think:
        return answer
    return f"{think.rstrip('.')}. {answer}"


def _one_line(answer: str) -> str:
    lines = [line.strip().strip("*").strip() for line in answer.splitlines()]
    return next((line for line in lines if line), "")
