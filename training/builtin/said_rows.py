"""Training rows for the reranker that no picture is needed for: the same thing said in two ways.

What the reasoner says of training pictures is a few thousand rows, which a small model learns by
heart: it then believes what it remembers of a name rather than what it reads. Here are as many as
wanted, about training concepts and about things that have no name at all but a few coined words, so
that nothing is left but to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from training.builtin import texts
from training.builtin.words import concept_words
from training.data.concepts import Concept
from tte_jax.cascade.texts import rerank_text
from tte_jax.preprocess.ecr import parse_ecr

COINED = 0.4
"""Share of the rows about things without a name."""
RAW = 0.3
"""Share of the texts on either side that are no reasoning."""


class SaidRows:
    """Draws rows about some concepts.

    Args:
      candidates: near misses of a row, with the right one; strangers: behind them.
    """

    def __init__(self, concepts: Sequence[Concept], *, candidates: int, strangers: int) -> None:
        self._concepts = concepts
        self._candidates, self._strangers = candidates, strangers
        self._vocabulary = np.array(sorted({w for c in concepts for w in concept_words(c)}))
        self._reasonings = texts.Reasonings(concepts)
        families: dict[str, list[int]] = {}
        self._near: dict[str, list[int]] = {}
        for i, concept in enumerate(concepts):
            families.setdefault(concept.family, []).append(i)
            for key in _alike(concept):
                self._near.setdefault(key, []).append(i)
        self._families = list(families.values())

    def draw(self, count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Rows as `training.rerank` reads them."""
        for _ in range(count):
            yield self._coined(rng) if rng.random() < COINED else self._known(rng)

    def _known(self, rng: np.random.Generator) -> dict[str, Any]:
        family = self._families[int(rng.integers(len(self._families)))]
        index = family[int(rng.integers(len(family)))]
        concept = self._concepts[index]
        alike = {i for key in _alike(concept) for i in self._near[key]} - {index}
        near = rng.permutation(sorted(alike))[: self._candidates - 1].tolist()
        others = rng.integers(len(self._concepts), size=self._strangers).tolist()
        wrong = [self._concepts[i] for i in [*near, *others]]
        label = texts.label(concept)
        raw = rng.random() < RAW

        def say(one: Concept) -> str:
            return self._name(one, rng) if raw else self._reasoning(one, rng)

        query = texts.text_query(concept, rng) if rng.random() < RAW else None
        return _row(
            query or self._reasoning(concept, rng),
            say(concept),
            [say(one) for one in wrong if texts.label(one) != label],
        )

    def _name(self, concept: Concept, rng: np.random.Generator) -> str:
        return concept.label if rng.random() < 0.5 else texts.label(concept)

    def _reasoning(self, concept: Concept, rng: np.random.Generator) -> str:
        """The true one, some of its cues left out: two drawings do not show the same."""
        whole = rerank_text(parse_ecr(self._reasonings.of(concept)))
        think, answer = whole.split(". Answer: ", 1)
        kind, _, cues = think.partition(": ")
        kept = [cue for cue in cues.split(", ") if cue and rng.random() < 0.8]
        think = f"{kind}: {', '.join(kept)}" if kept else kind
        return f"{think}. Answer: {answer}"

    def _coined(self, rng: np.random.Generator) -> dict[str, Any]:
        words = self._words(rng)
        near = [self._changed(words, rng) for _ in range(self._candidates - 1)]
        wrong = [*near, *(self._words(rng) for _ in range(self._strangers))]
        raw = rng.random() < RAW
        query = " ".join(words) if rng.random() < RAW else _echo(words)
        return _row(
            query,
            " ".join(words) if raw else _echo(words),
            [" ".join(one) if raw else _echo(one) for one in wrong if one != words],
        )

    def _words(self, rng: np.random.Generator) -> list[str]:
        made = []
        for _ in range(int(rng.integers(1, 5))):
            one, other = (str(w) for w in rng.choice(self._vocabulary, 2))
            cut = int(rng.integers(1, len(one) + 1))
            made.append(one if rng.random() < 0.5 else one[:cut] + other[-3:])
        return made

    def _changed(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """A word is another, or one more, or one less."""
        made, place = list(words), int(rng.integers(len(words)))
        new = self._words(rng)[0]
        draw = rng.random()
        if draw < 0.6 or len(words) == 1:
            made[place] = new
        elif draw < 0.8:
            made.insert(place, new)
        else:
            del made[place]
        return made


def _alike(concept: Concept) -> list[str]:
    return [f"family {concept.family}", f"kind {concept.subgroup}", *concept.tags[:2]]


def _echo(words: Sequence[str]) -> str:
    return rerank_text(parse_ecr(texts.echo(" ".join(words))))


def _row(query: str, right: str, wrong: Sequence[str]) -> dict[str, Any]:
    wrong = [one for one in wrong if one != right]
    return {"query": query, "candidates": [right, *wrong], "labels": [1] + [0] * len(wrong)}
