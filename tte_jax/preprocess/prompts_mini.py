"""The short prompts of the built-in models; `docs/architecture.md` is their specification.

The models were trained on exactly these characters, and on nothing that varies with the caller:
instructions are not part of them.
"""

from __future__ import annotations

from tte_jax.content import Task
from tte_jax.preprocess.template import IM_END, IM_START, Piece, PrefixEnd, Special, Tagged, Turn

NAME = "mini"


def reason(turn: Turn) -> list[Piece]:
    """Up to and including `assistant`, a new line; the model goes on with the ECR."""
    return [
        Special(IM_START),
        "user\n",
        *_user(turn),
        Special(IM_END),
        "\n",
        Special(IM_START),
        "assistant\n",
    ]


def embed(turn: Turn, ecr: str) -> list[Piece]:
    """The reasoner's sequence continued: the ECR and the end of the turn, which is pooled."""
    return [*reason(turn), Tagged(ecr), Special(IM_END)]


def rerank_prefix(query: str, instruction: str) -> list[Piece]:
    del instruction
    return [Special(IM_START), f"user\n<Query>: {query}\n<Document>:", PrefixEnd()]


def rerank_suffix(document: str) -> list[Piece]:
    return [f" {document}", Special(IM_END), "\n", Special(IM_START), "assistant\n"]


def _user(turn: Turn) -> list[Piece]:
    match turn.task:
        case Task.TEXT:
            words = f"Find: {turn.text}"
        case Task.COMPOSED:
            words = f"Change: {turn.text}"
        case Task.REWRITE:
            seen = turn.seen.answer or turn.seen.think
            words = f"Seen: {seen}\nQuery: {turn.wanted.answer or turn.wanted.think}"
        case Task.IMAGE:
            words = "What is this?" + (f"\n{turn.text}" if turn.text else "")
    return [*turn.media, words]
