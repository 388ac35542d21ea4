"""Held-out retrieval query by query, for comparing embedders that differ in their training alone.

Tasks as in `training.builtin.evaluate`, with fewer queries: an art style, concepts and combinations
that no training saw. ECRs of both sides are written once, by one reasoner, and every embedder
reads the same. What comes out is the rank of each query's one right picture, so that two embedders
can be compared query by query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.builtin import SERVED_STYLE, texts
from training.builtin.evaluate import UNSEEN_STYLE, Pictures, Query, composed_queries
from training.data.concepts import Concept
from training.data.ecrs import EcrStore, ecr_key
from training.data.emoji import EmojiData
from training.data.examples import Document
from training.data.rows import document
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.stages import EmbedItem


@dataclass(frozen=True)
class Task:
    """Queries for one pool; `right` [Q] is the place of each one's answer in it."""

    queries: tuple[Document, ...]
    pool: str
    right: np.ndarray


class HeldOut:
    """The tasks, without any model.

    Args:
      data: a built data set.
      queries: of each task, at most; chosen by `seed`.
      pool: pictures of a pool, at most, beside those that are right for some query; 0 = all.

    Attributes:
      tasks: by name; pools: pictures of each style, by style.
    """

    def __init__(
        self, data: EmojiData, *, queries: int = 400, pool: int = 0, seed: int = 0
    ) -> None:
        pictures, rng = Pictures(data), np.random.default_rng(seed)
        by_key = {c.key: c for c in data.concepts}
        combinations = {data.concepts[i].key for i in data.concept_ids[data.heldout_combination]}
        unseen = [k for k in pictures.keys(UNSEEN_STYLE) if _plain(by_key[k])]
        both = [k for k in unseen if pictures.has(SERVED_STYLE, k)]
        asked = [both[i] for i in sorted(rng.permutation(len(both))[:queries])]
        changed = {
            style: composed_queries(
                data, pictures, style, lambda c: c.key in combinations, queries, rng
            )
            for style in ("noto", UNSEEN_STYLE)
        }
        made = {
            "text by label → unseen style": (
                UNSEEN_STYLE,
                [Query(Content.of(texts.label(by_key[k])), k) for k in asked],
            ),
            "text by tags → unseen style": (
                UNSEEN_STYLE,
                [Query(Content.of(_tags(by_key[k])), k) for k in asked],
            ),
            "picture of the unseen style → OpenMoji": (
                SERVED_STYLE,
                [Query(Content.of("", pictures.of(UNSEEN_STYLE, k)), k) for k in asked],
            ),
            "picture and change → OpenMoji, held-out combinations": (
                SERVED_STYLE,
                changed["noto"],
            ),
            "picture of the unseen style and change → OpenMoji, held-out combinations": (
                SERVED_STYLE,
                changed[UNSEEN_STYLE],
            ),
        }
        self.pools: dict[str, tuple[Document, ...]] = {}
        place: dict[str, dict[str, int]] = {}
        for style, every in ((UNSEEN_STYLE, unseen), (SERVED_STYLE, pictures.keys(SERVED_STYLE))):
            right = {q.answer for own, some in made.values() if own == style for q in some}
            others = [k for k in every if k not in right]
            kept = right | {others[i] for i in rng.permutation(len(others))[: pool or len(others)]}
            keys = [k for k in every if k in kept]
            self.pools[style] = tuple(document(Content.of("", pictures.of(style, k))) for k in keys)
            place[style] = {key: i for i, key in enumerate(keys)}
        self.tasks = {
            name: Task(
                tuple(document(q.content) for q in own),
                style,
                np.array([place[style][q.answer] for q in own]),
            )
            for name, (style, own) in made.items()
        }

    def wanted(self) -> Iterator[tuple[Document, Side]]:
        """What needs an ECR."""
        for pool in self.pools.values():
            yield from ((one, Side.DOCUMENT) for one in pool)
        for task in self.tasks.values():
            yield from ((one, Side.QUERY) for one in task.queries)

    def ranks(self, embedder: Embedder, store: EcrStore) -> dict[str, np.ndarray]:
        """[Q] place of the right document by task, 0 = first; of equal scores the earlier one
        of the pool stands first."""

        def vectors(documents: tuple[Document, ...], side: Side) -> np.ndarray:
            told = [(d.content, store.get(ecr_key(d, side))) for d in documents]
            return embedder.embed([EmbedItem(content, side, ecr) for content, ecr in told])

        pools = {name: vectors(pool, Side.DOCUMENT) for name, pool in self.pools.items()}
        return {
            name: places(vectors(task.queries, Side.QUERY), pools[task.pool], task.right)
            for name, task in self.tasks.items()
        }


def places(queries: np.ndarray, documents: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[Q] how many documents stand before the right one, of unit vectors [Q D] and [N D]."""
    scores = queries @ documents.T
    own = scores[np.arange(len(right)), right][:, None]
    before = (scores == own) & (np.arange(len(documents)) < right[:, None])
    return ((scores > own) | before).sum(1)


def _plain(concept: Concept) -> bool:
    return concept.skin == "none" and not concept.tones


def _tags(concept: Concept) -> str:
    return ", ".join(tag.lower() for tag in concept.tags) or texts.label(concept)
