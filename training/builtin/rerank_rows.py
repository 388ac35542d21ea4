"""Training rows for the reranker: what the retriever really finds, as the reasoner really words it.

    python -m training.builtin.rerank_rows --out .data/runs/rerank/rows.jsonl

The reasoner describes training pictures, the embedder ranks them, and the first candidates become
one row: ranked, with the right ones marked. Documents that have nothing to do with the query stand
behind them; a reranker that has only seen near misses says yes to what is far off. Documents are as
they are served; queries are spoilt (small, grey, turned, cut, noisy), so that the reasoner errs
about them as it does about art that it never saw. Where documents were spoilt too, a candidate in
just the query's words was wrong so often that the reranker did not learn to look for it. A text
stands on either side without a reasoning too, as it does when a client asks for none, or when the
documents are names. Most rows are texts alone (`builtin.said_rows`). Only training concepts are
used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training.builtin import texts
from training.builtin.evaluate import Roles, embed_all, png, reason_all
from training.builtin.images import spoil
from training.builtin.said_rows import SaidRows
from training.builtin.sampling import ImageTable, image_table, pick_row
from training.data.concepts import Concept
from training.data.emoji import EmojiData, load
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.cascade.texts import rerank_text
from tte_jax.content import NO_REASONING, Content, Reasoning, Side
from tte_jax.embedder import Embedder
from tte_jax.reasoner import Reasoner


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      model: the unified model directory.
      text, image, composed: how many queries of each kind look for drawings; named: how many
        drawings look for their name; said: rows of texts alone (`builtin.said_rows`).
      bare: share of the texts that are asked without a reasoning.
      documents: drawings that are found.
      candidates: of a row, found ones; strangers: of a row, drawn from everything.
      spoilt_queries, spoilt_documents: how badly, at most, in [0, 1].
    """

    data: Path = Path(".data/emoji")
    model: Path = WEIGHTS_DIR / REASONER
    out: Path = Path(".data/runs/rerank/rows.jsonl")
    text: int = 1200
    image: int = 800
    composed: int = 1400
    named: int = 800
    said: int = 14000
    bare: float = 0.3
    documents: int = 3300
    candidates: int = 10
    strangers: int = 6
    spoilt_queries: float = 0.8
    spoilt_documents: float = 0.0
    budget: int = 64
    seed: int = 0


@dataclass
class Asked:
    """Queries in order, the concept that each wants, and whether it is asked without reasoning."""

    contents: list[Content] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    bare: list[bool] = field(default_factory=list)

    def add(self, content: Content, answer: int, *, bare: bool = False) -> None:
        self.contents.append(content)
        self.answers.append(int(answer))
        self.bare.append(bare)


@dataclass(frozen=True)
class Pool:
    """What is found: the concept of each document, what the reranker reads of it, its vector."""

    concepts: np.ndarray
    read: list[str]
    vectors: np.ndarray


class Questions:
    """Draws queries about training concepts whose drawings are in the pool."""

    def __init__(
        self, data: EmojiData, shown: np.ndarray, config: Config, rng: np.random.Generator
    ) -> None:
        self.data, self.config, self.rng = data, config, rng
        self.table: ImageTable = image_table(data)
        known = set(shown.tolist())
        self.here = [i for i, c in enumerate(self.table.concepts) if c in known]
        weights = self.table.weights[self.here]
        self.weights = weights / weights.sum()

    def texts(self, count: int) -> Asked:
        asked = Asked()
        for index in self._some(count):
            said = Content.of(texts.text_query(self._concept(index), self.rng))
            bare = self.rng.random() < self.config.bare
            asked.add(said, self.table.concepts[index], bare=bare)
        return asked

    def images(self, count: int) -> Asked:
        asked = Asked()
        for index in self._some(count):
            asked.add(Content.of("", self._picture(index)), self.table.concepts[index])
        return asked

    def composed(self, count: int) -> Asked:
        members: dict[str, list[int]] = {}
        for index in self.here:
            concept = self._concept(index)
            if not concept.multi_person and (concept.gender != "none" or concept.skin != "none"):
                members.setdefault(concept.family, []).append(index)
        families = [m for m in members.values() if len(m) >= 4]
        asked = Asked()
        while len(asked.contents) < count:
            family = families[self.rng.integers(len(families))]
            source, target = self.rng.choice(family, 2, replace=False).tolist()
            a, b = self._concept(source), self._concept(target)
            if texts.changed(a, b):
                change = texts.change_query(a, b, self.rng)
                asked.add(
                    Content.of(change, self._picture(source)), int(self.table.concepts[target])
                )
        return asked

    def names(self) -> tuple[list[Content], np.ndarray]:
        """A name of each concept, as a text document, and the concepts."""
        said = []
        for index in self.here:
            concept = self._concept(index)
            ways = (texts.label(concept), concept.label, texts.text_query(concept, self.rng))
            said.append(Content.of(ways[self.rng.choice(3, p=(0.5, 0.3, 0.2))]))
        return said, self.table.concepts[self.here]

    def _some(self, count: int) -> list[int]:
        return self.rng.choice(self.here, count, p=self.weights).tolist()

    def _concept(self, index: int) -> Concept:
        return self.data.concepts[self.table.concepts[index]]

    def _picture(self, index: int) -> bytes:
        row = pick_row(self.table, int(index), self.rng)
        return spoilt(self.data, row, self.rng, self.config.spoilt_queries)


def spoilt(data: EmojiData, row: int, rng: np.random.Generator, most: float) -> bytes:
    return png(spoil(data.images[row], rng, float(rng.uniform(0.0, most))))


def documents(data: EmojiData, count: int, rng: np.random.Generator) -> list[int]:
    """Rows of training originals, OpenMoji first, since that is what is served."""
    rows = data.rows("train", originals=True)
    style = np.array([data.styles[s] for s in data.style_ids[rows]])
    served, others = rows[style == "openmoji"], rows[style != "openmoji"]
    both = np.concatenate([rng.permutation(served), rng.permutation(others)])
    return [int(r) for r in both[:count]]


def drawings(
    roles: Roles, data: EmojiData, rows: Sequence[int], config: Config, rng: np.random.Generator
) -> Pool:
    """Drawings with their reasonings."""
    most = config.spoilt_documents
    contents = [Content.of("", spoilt(data, row, rng, most)) for row in rows]
    ecrs = reason_all(roles, contents, Side.DOCUMENT, config.budget)
    vectors = embed_all(roles, contents, Side.DOCUMENT, ecrs)
    return Pool(data.concept_ids[list(rows)], [rerank_text(e) for e in ecrs], vectors)


def names(roles: Roles, questions: Questions) -> Pool:
    """Names without reasonings, as the published method has them."""
    contents, concepts = questions.names()
    vectors = embed_all(roles, contents, Side.DOCUMENT, [NO_REASONING] * len(contents))
    return Pool(concepts, [c.text for c in contents], vectors)


def ranked(
    roles: Roles, asked: Asked, pool: Pool, config: Config, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """A row of each query; the last one found makes room for a right one when none is found."""
    reasoned = iter(
        reason_all(
            roles,
            [c for c, bare in zip(asked.contents, asked.bare, strict=True) if not bare],
            Side.QUERY,
            config.budget,
        )
    )
    ecrs: list[Reasoning] = [NO_REASONING if bare else next(reasoned) for bare in asked.bare]
    vectors = embed_all(roles, asked.contents, Side.QUERY, ecrs)
    order = np.argsort(-(vectors @ pool.vectors.T), axis=1, kind="stable")
    for content, ecr, answer, found in zip(asked.contents, ecrs, asked.answers, order, strict=True):
        head = found[: config.candidates].tolist()
        right = np.flatnonzero(pool.concepts == answer)
        if not set(head) & set(right.tolist()):
            head[-1] = int(right[0])
        others = rng.permutation(found[config.candidates :])[: config.strangers]
        head += [i for i in others.tolist() if pool.concepts[i] != answer]
        row = {
            "query": rerank_text(ecr, content),
            "candidates": [pool.read[i] for i in head],
            "labels": [int(pool.concepts[i] == answer) for i in head],
        }
        if row["query"] and all(row["candidates"]):
            yield row


def main(config: Config) -> None:
    data = load(config.data)
    rng = np.random.default_rng(config.seed)
    roles = Roles(
        Reasoner.from_pretrained(config.model), Embedder.from_pretrained(config.model), None
    )
    drawn = drawings(roles, data, documents(data, config.documents, rng), config, rng)
    questions = Questions(data, drawn.concepts, config, rng)
    kinds = {
        "text": (questions.texts(config.text), drawn),
        "image": (questions.images(config.image), drawn),
        "composed": (questions.composed(config.composed), drawn),
        "named": (questions.images(config.named), names(roles, questions)),
    }
    lines: list[str] = []
    for kind, (asked, pool) in kinds.items():
        if not asked.contents:
            continue
        rows = list(ranked(roles, asked, pool, config, rng))
        first = np.mean([row["labels"][0] for row in rows]) if rows else 0.0
        print(f"{kind}: {len(rows)} rows; a right document is the first in {first:.1%}")
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
    known = [data.concepts[c] for c in questions.table.concepts]
    said = SaidRows(known, candidates=config.candidates, strangers=config.strangers)
    lines += [json.dumps(row, ensure_ascii=False) for row in said.draw(config.said, rng)]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = config.out.with_suffix(".partial")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, config.out)
    print(f"{len(lines)} rows in {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
