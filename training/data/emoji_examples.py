"""The emoji data set's training split as examples: text, image and composed queries for drawings.

Documents are the artists' original drawings, so that a corpus is finite and can be mined. A text
query is something a person might type, an image query is the same concept in another hand, a
composed query is a drawing and a change of gender or skin tone. Every example depends on (seed,
kind, index) alone. Examples of one concept are of one group: its drawings by other artists are
right answers too, and never negatives.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from training.builtin import texts
from training.builtin.sampling import image_table
from training.data.concepts import Concept
from training.data.emoji import EmojiData
from training.data.rows import Item, MediaFile, Row, RowSource
from tte_jax.errors import InvalidInputError

KINDS = ("text", "image", "composed")
GROUPS = ("concept", "family")


class EmojiSource(RowSource):
    """Queries of one kind.

    Args:
      data: a built data set; only images of the split "train" are used.
      kind: "text", "image" or "composed".
      count: how many examples.
      seed: another seed draws others.
      group: "concept", or "family" for drawings that differ only in gender, skin tone and hair to
        count as the same too. Composed queries need "concept", since their wrong answers are
        exactly those.
      families: only concepts of so many families, drawn by `seed`, the same ones for every kind; 0
        = all. Fewer make several queries, and several artists' drawings, of each concept.
      truth: give every document and query the ECR that the concept should get. It names the
        answer, so it is for upper bounds and for tests; `training.reason` writes real ones.

    Raises:
      InvalidInputError: no such kind or group; no family has two variants to change between.
    """

    def __init__(
        self,
        data: EmojiData,
        kind: str,
        count: int,
        *,
        seed: int = 0,
        group: str = "concept",
        families: int = 0,
        truth: bool = False,
    ) -> None:
        if kind not in KINDS or group not in GROUPS or (kind == "composed" and group != "concept"):
            raise InvalidInputError(
                f"kind {kind!r} with group {group!r}: kinds are {', '.join(KINDS)}; groups are "
                f"{', '.join(GROUPS)}, for composed queries concept"
            )
        self._data, self._kind, self._count = data, kind, count
        self._seed, self._group, self._truth = (seed, KINDS.index(kind)), group, truth
        self._table = image_table(data)
        self._heap = np.cumsum(self._table.weights)
        self._reasonings = texts.Reasonings(data.concepts)
        originals = np.flatnonzero(data.masks["train"] & (data.variants == 0))
        self._originals: dict[int, list[int]] = {}
        for row in originals:
            self._originals.setdefault(int(data.concept_ids[row]), []).append(int(row))
        self._drawn = np.array([int(c) in self._originals for c in self._table.concepts])
        if families:
            of = [data.concepts[int(c)].family for c in self._table.concepts]
            names = np.random.default_rng((seed, len(KINDS))).permutation(sorted(set(of)))
            self._drawn &= np.isin(of, names[:families])
        if not self._drawn.any():
            raise InvalidInputError(f"none of {families} families has a drawing to train on")
        self._changes = self._pairs() if kind == "composed" else []
        if kind == "composed" and not self._changes:
            raise InvalidInputError("no family of the data set has two variants to change between")

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Row:
        if not 0 <= index < self._count:
            raise IndexError(f"{self._count} {self._kind} queries, asked for {index}")
        rng = np.random.default_rng((*self._seed, index))
        if self._kind == "composed":
            concepts = self._changes[rng.integers(len(self._changes))]
            source, target = (self._data.concepts[c] for c in concepts)
            answer = concepts[1]
            asked = self._picture(int(rng.choice(self._originals[concepts[0]])))
            query = Item(texts.change_query(source, target, rng), asked)
        else:
            answer = self._draw(rng)
            if self._kind == "text":
                query = Item(texts.text_query(self._data.concepts[answer], rng))
            else:
                query = Item(media=self._picture(self._any_row(answer, rng)))
        wanted = self._data.concepts[answer]
        drawings = self._originals[answer]
        shown = query.media[0].data if query.media and self._kind == "image" else None
        document = Item(media=self._picture(self._other(drawings, shown, rng)))
        if self._truth:
            ecr = self._reasonings.of(wanted)
            query, document = (Item(i.text, i.media, i.instruction, ecr) for i in (query, document))
        return Row(
            key=f"{self._kind}-{self._seed[0]}-{index}",
            dataset=f"emoji-{self._kind}",
            query=query,
            positives=(document,),
            group=self._name(wanted),
        )

    def _name(self, concept: Concept) -> str:
        return f"emoji:{concept.key if self._group == 'concept' else concept.family}"

    def _draw(self, rng: np.random.Generator) -> int:
        while True:
            at = int(np.searchsorted(self._heap, rng.random() * self._heap[-1], "right"))
            if self._drawn[min(at, len(self._drawn) - 1)]:
                return int(self._table.concepts[min(at, len(self._drawn) - 1)])

    def _any_row(self, concept: int, rng: np.random.Generator) -> int:
        at = int(np.flatnonzero(self._table.concepts == concept)[0])
        styles = self._table.rows[at]
        return int(rng.choice(styles[rng.integers(len(styles))]))

    def _other(self, rows: list[int], shown: bytes | None, rng: np.random.Generator) -> int:
        """One of the drawings, not the picture that is asked with where there is another."""
        for row in rng.permutation(rows):
            if shown is None or png(self._data.images[row]) != shown:
                return int(row)
        return rows[0]

    def _picture(self, row: int) -> tuple[MediaFile, ...]:
        return (MediaFile(None, data=png(self._data.images[row])),)

    def _pairs(self) -> list[tuple[int, int]]:
        families: dict[str, list[int]] = {}
        for at in np.flatnonzero(self._drawn):
            concept = int(self._table.concepts[at])
            one = self._data.concepts[concept]
            if not one.multi_person and (one.gender != "none" or one.skin != "none"):
                families.setdefault(one.family, []).append(concept)
        concepts = self._data.concepts
        return [
            (a, b)
            for members in families.values()
            for a in members
            for b in members
            if a != b and texts.changed(concepts[a], concepts[b])
        ]


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8 → PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()
