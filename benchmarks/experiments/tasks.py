"""What is asked: held-out queries of the emoji data set, as tasks of the evaluation's runner.

Texts look for drawings of the style that training never saw; pictures of that style, and pictures
with a change whose result training never saw, look for drawings of the served corpus' style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from training.builtin import SERVED_STYLE, texts
from training.builtin.evaluate import FOUR_STYLES, UNSEEN_STYLE, Pictures, composed_queries
from training.data.concepts import Concept
from training.data.emoji import EmojiData
from tte_jax.content import Content
from tte_jax.evaluation.task import EvalTask, Item, Query

TITLES = {
    "label": "text → image, by label",
    "tags": "text → image, by tags",
    "image": "image → image, other style",
    "composed": "composed, trained style",
    "composed-unseen": "composed, unseen style",
}
NAMES = tuple(TITLES)


@dataclass(frozen=True)
class Case:
    """A task, and what a reasoner that is right says.

    Attributes:
      answers: a query's id, or a candidate's name → the answer line of the true ECR.
      ecrs: likewise → the whole true ECR.
    """

    task: EvalTask
    answers: Mapping[str, str]
    ecrs: Mapping[str, str]


def cases(
    data: EmojiData, names: Sequence[str], *, queries: int, pool: int, seed: int
) -> dict[str, Case]:
    """The tasks by name.

    Args:
      queries: of each task, at most; drawn by `seed`.
      pool: candidates of each task, the right ones among them; 0 = all there are.
    """
    made = _Maker(data, queries, pool, seed)
    return {name: made.case(name) for name in names}


class _Maker:
    def __init__(self, data: EmojiData, queries: int, pool: int, seed: int) -> None:
        self.data, self.queries, self.pool, self.seed = data, queries, pool, seed
        self.pictures = Pictures(data)
        self.by_key = {c.key: c for c in data.concepts}
        self.reasonings = texts.Reasonings(data.concepts)
        self.drawn: dict[tuple[str, str], Content] = {}
        rows = np.flatnonzero(data.heldout_combination)
        self.combinations = {data.concepts[i].key for i in data.concept_ids[rows]}
        self.plain = [
            key
            for key in self.pictures.keys(UNSEEN_STYLE)
            if self.by_key[key].skin == "none"
            and not self.by_key[key].tones
            and all(self.pictures.has(style, key) for style in FOUR_STYLES)
        ]

    def case(self, name: str) -> Case:
        rng = np.random.default_rng([self.seed, NAMES.index(name)])
        if name in ("composed", "composed-unseen"):
            style = UNSEEN_STYLE if name == "composed-unseen" else "noto"
            asked = composed_queries(
                self.data,
                self.pictures,
                style,
                lambda concept: concept.key in self.combinations,
                self.queries,
                rng,
            )
            pairs = [(query.content, query.answer) for query in asked]
        else:
            keys = [self.plain[i] for i in rng.permutation(len(self.plain))[: self.queries]]
            pairs = [(self._content(name, key), key) for key in keys]
        style = UNSEEN_STYLE if name in ("label", "tags") else SERVED_STYLE
        everything = self.plain if style == UNSEEN_STYLE else self.pictures.keys(style)
        return self._made(name, pairs, style, self._pool(everything, {key for _, key in pairs}))

    def _content(self, name: str, key: str) -> Content:
        concept = self.by_key[key]
        if name == "label":
            return Content.of(texts.label(concept))
        if name == "tags":
            return Content.of(_tags(concept))
        return Content.of("", self.pictures.of(UNSEEN_STYLE, key))

    def _pool(self, keys: Sequence[str], right: set[str]) -> list[str]:
        if not self.pool:
            return list(keys)
        # One order for all tasks, so that they share candidates and their reasonings.
        order = np.random.default_rng(self.seed).permutation(len(keys))
        others = [key for key in (keys[int(i)] for i in order) if key not in right]
        return sorted(right) + others[: max(self.pool - len(right), 0)]

    def _made(
        self, name: str, pairs: Sequence[tuple[Content, str]], style: str, pool: Sequence[str]
    ) -> Case:
        queries = tuple(
            Query(f"query {i}", partial(_same, content), (key,))
            for i, (content, key) in enumerate(pairs)
        )
        items = [Item(key, partial(self._document, style, key)) for key in pool]
        right = {f"query {i}": key for i, (_, key) in enumerate(pairs)} | {k: k for k in pool}
        concepts = {id: self.by_key[key] for id, key in right.items()}
        return Case(
            EvalTask(name, "image", "hit@1", queries, lambda: iter(items)),
            {id: texts.label(concept) for id, concept in concepts.items()},
            {id: self.reasonings.of(concept) for id, concept in concepts.items()},
        )

    def _document(self, style: str, key: str) -> Content:
        # Kept: every arm of every task loads its candidates.
        if (style, key) not in self.drawn:
            self.drawn[style, key] = Content.of("", self.pictures.of(style, key))
        return self.drawn[style, key]


def _same(content: Content) -> Content:
    return content


def _tags(concept: Concept) -> str:
    return ", ".join(tag.lower() for tag in concept.tags) or texts.label(concept)
