"""The listwise reranker's prompt: all candidates, numbered, and the order as a JSON list.

For instruction models that were not trained for it; any chat model of the Qwen families has the
turns. Thinking is closed before it begins, as in the pointwise prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tte_jax.preprocess.ecr import END_THINK, THINK
from tte_jax.preprocess.prompts_full import RERANK_SAME
from tte_jax.preprocess.template import IM_END, IM_START, Piece, Special, Tagged

_SYSTEM = (
    "You order search results. Reply with the numbers of all documents, the best match first, as "
    "one JSON list such as [2, 3, 1], and nothing else."
)


def order(query: str, documents: Sequence[str], instruction: str) -> list[Piece]:
    """Up to where the list begins. Documents are numbered from 1."""
    listed = "\n".join(f"[{i}] {document}" for i, document in enumerate(documents, start=1))
    return [
        Special(IM_START),
        f"system\n{_SYSTEM}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        f"user\n<Instruct>: {instruction or RERANK_SAME}\n<Query>: {query}\n"
        f"<Documents>:\n{listed}\n<Query>: {query}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        "assistant\n",
        Tagged(f"{THINK}\n\n{END_THINK}\n\n"),
    ]


def parse_order(text: str, count: int) -> tuple[list[int], int]:
    """(all of 0 to count - 1, how many of them the text put in order).

    The text's first list counts, ended or cut off; numbers that name no document, or one a second
    time, are passed over. Documents that it leaves out follow in the order in which they were
    given, which is the whole order where the text has no list.
    """
    found = re.search(r"\[([^\[\]]*)\]?", text)
    named: dict[int, None] = {}
    if found is not None:
        for number in re.findall(r"\d+", found[1]):
            if 1 <= len(number) <= 9 and 1 <= int(number) <= count:
                named.setdefault(int(number) - 1)
    return [*named, *(i for i in range(count) if i not in named)], len(named)


def longest_order(count: int) -> str:
    """A list with as many characters as any of `count` documents."""
    return json.dumps(list(range(1, count + 1)))
