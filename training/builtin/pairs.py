"""Training batches of the unified model: three kinds of query, each with its document.

Everything here is host work on NumPy; a batch depends on (seed, step) alone. Sequences come from
the same `PromptSet` that serves the model, so what is trained is what is served.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from training import builtin
from training.builtin import images, sampling, texts
from training.builtin.mined import confused
from training.builtin.packing import Example, Leaf, Packed, Packer, Placed
from training.builtin.words import concept_words
from training.data.concepts import Concept
from training.data.emoji import EmojiData
from tte_jax.content import Content, Media, Side
from tte_jax.json_lines import json_lines
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.positions import mrope_positions
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.stages import ReasonItem

_PATCHES = builtin.SIDE // builtin.IMAGES.patch_size
GRID = (1, _PATCHES, _PATCHES)
FEATURES = _PATCHES**2 // builtin.IMAGES.merge_size**2  # merged patches of one picture
LENGTH = 128  # tokens of a packed row
_PICTURE = Media(b"picture")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step. Queries are ordered text, image, composed.

    The first documents answer a text query each, and some of them an image query as well; the rest
    answer the composed queries.

    Attributes:
      pictures: [M, 112, 112, 3] uint8: documents, then image queries, then composed queries.
      picture_concepts: [M] int32.
      packed: the sequences of the documents, then of the text, image and composed queries, then
        those of coined texts, which are in no list below.
      concepts: [B] int32 concept of each document.
      answers: [Q] int32 document of each query.
      proxies: [B + Q] int32, which training concept each document, then each query, is about.
    """

    pictures: Leaf
    picture_concepts: Leaf
    packed: Packed
    concepts: Leaf
    answers: Leaf
    proxies: Leaf


@dataclass(frozen=True)
class Mix:
    """What a batch holds.

    Attributes:
      text, image, composed: queries of each kind; image ≤ text.
      corrupt, corrupt_text: how often an ECR is a wrong one, beside pictures and beside texts.
      coined: texts that name no concept. Their ECR, the text's own words, is learnt; they answer
        nothing.
      echoed: how often the ECR of a text query is its own words.
      own: how often it is what the model itself had said (`builtin.own`), where that is given.
      mined: how many of the groups of concepts that are drawn together are a query's and its
        negatives', where a mined round is given; the others are of one kind.
      served: how often a document is the OpenMoji original, which is what is served.
      rows: rows of LENGTH tokens that all sequences must fit into.
      learnt: tokens of ECRs that are learnt, at most.
    """

    text: int = 60
    image: int = 60
    composed: int = 24
    corrupt: float = 0.1
    corrupt_text: float = 0.05
    coined: int = 16
    echoed: float = 0.1
    own: float = 0.7
    mined: float = 0.7
    served: float = 0.5
    rows: int = 76
    learnt: int = 4400


LOOKALIKES = 8


def lookalikes(prototypes: np.ndarray, families: np.ndarray) -> np.ndarray:
    """[C, LOOKALIKES] the concepts of other families that each is most easily mistaken for.

    Args:
      prototypes: [C, D] mean vision features of each training concept.
      families: [C] family ids.
    """
    z = prototypes - prototypes.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similar = np.where(families[:, None] == families[None, :], -np.inf, z @ z.T)
    return np.argsort(-similar, axis=1, kind="stable")[:, :LOOKALIKES]


class Own(NamedTuple):
    """What the model said of a picture (`row`), a text, or both; -1 and "" where absent."""

    row: int
    concept: int
    text: str
    ecr: str


class PairSource:
    """Draws batches from the training split; `prototypes` as in `lookalikes`, None where no ECR is
    replaced by a wrong one; `own` as written by `training.builtin.own`; `mined` a sealed round of
    `training.loop` over these data."""

    def __init__(
        self,
        data: EmojiData,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        *,
        prototypes: np.ndarray | None,
        seed: int,
        own: Path | None = None,
        mined: Path | None = None,
    ) -> None:
        self._data = data
        self._seed = seed
        self._prompts = PromptSet(
            "mini", tokenizer, image_config, load=lambda media, path: (_NO_PATCHES, GRID)
        )
        self._table = sampling.image_table(data)
        self._lookalikes = None
        if prototypes is not None:
            self._lookalikes = lookalikes(prototypes, self._table.family)
        self.reasonings = texts.Reasonings(data.concepts)
        self._image = tokenizer.token_id("<|image_pad|>")
        self._video = tokenizer.token_id("<|video_pad|>")
        self._packer = Packer(tokenizer, image_token=self._image, features=FEATURES)
        self.place = lru_cache(200_000)(self._place)
        self._families = self._variants()
        self._subgroups = self._siblings()
        self._served = self._served_rows()
        self._vocabulary = sorted({w for c in self._concepts() for w in concept_words(c)})
        self._said = _Said(self._table, own) if own is not None else None
        self._confused = confused(mined, data, self._table.concepts) if mined is not None else []

    def batches(self, start: int, mix: Mix) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, … without end."""
        step = start
        while True:
            yield self._batch(np.random.default_rng((self._seed, step)), mix)
            step += 1

    @property
    def concepts(self) -> int:
        """C: how many concepts have training pictures; proxies are numbered like them."""
        return len(self._table.concepts)

    def labels(self, count: int) -> Iterator[Packed]:
        """The label of every training concept as a text query, `count` at a time, filled up at the
        end with the last one again."""
        prompts = [self.place(texts.label(c), False) for c in self._concepts()]
        prompts += [prompts[-1]] * (-len(prompts) % count)
        for start in range(0, len(prompts), count):
            yield self.bare(prompts[start : start + count])

    def bare(self, prompts: list[Placed], *, pictures: bool = False) -> Packed:
        """Sequences without ECRs; of pictures 0, 1, … where `pictures`."""
        examples = [Example(p, "", "", i if pictures else None) for i, p in enumerate(prompts)]
        packed = self._packer.pack(examples, rows=len(prompts) // 2, length=LENGTH, targets=1)
        assert packed is not None, "no prompt is longer than half a row"
        return packed

    def _place(self, text: str, picture: bool) -> Placed:
        """The reasoner's prompt for a text, a picture, or a picture with a change."""
        parts = Content.of(text).parts if text else ()
        content = Content(((_PICTURE,) if picture else ()) + parts)
        ids = np.asarray(self._prompts.reason(ReasonItem(content, Side.QUERY)).ids)
        positions, following = mrope_positions(
            ids,
            [GRID] if picture else [],
            image_token_id=self._image,
            video_token_id=self._video,
            merge_size=2,
        )
        return Placed(ids, positions, following)

    def _served_rows(self) -> dict[int, int]:
        """Table index → row of the original in the served style."""
        style = self._data.styles.index(builtin.SERVED_STYLE)
        place = {int(c): i for i, c in enumerate(self._table.concepts)}
        rows = self._data.rows("train", originals=True)
        rows = rows[self._data.style_ids[rows] == style]
        return {place[int(self._data.concept_ids[r])]: int(r) for r in rows}

    def _variants(self) -> list[np.ndarray]:
        """Families with at least four one-person variants: table indices, for changes."""
        grouped: dict[str, list[int]] = {}
        for index, concept in enumerate(self._concepts()):
            if not concept.multi_person and (concept.gender != "none" or concept.skin != "none"):
                grouped.setdefault(concept.family, []).append(index)
        return [np.array(v) for v in grouped.values() if len(v) >= 4]

    def _siblings(self) -> dict[str, np.ndarray]:
        grouped: dict[str, list[int]] = {}
        for index, concept in enumerate(self._concepts()):
            grouped.setdefault(concept.subgroup, []).append(index)
        return {k: np.array(v) for k, v in grouped.items()}

    def _concepts(self) -> list[Concept]:
        return [self._data.concepts[c] for c in self._table.concepts]

    def _batch(self, rng: np.random.Generator, mix: Mix) -> Batch:
        for _ in range(50):
            batch = self._draw_batch(rng, mix)
            if batch is not None:
                return batch
        raise ValueError(f"a batch does not fit into {mix.rows} rows of {LENGTH}; raise mix.rows")

    def _draw_batch(self, rng: np.random.Generator, mix: Mix) -> Batch | None:
        plain = [int(i) for i in self._draw(mix.text, mix.mined, rng)]
        changes = self.changes(mix, rng)
        answers = plain + [c.concept for c in changes]
        seen = [self._document(i, mix, rng) for i in answers]
        seen += [self._picture(i, mix, rng) for i in plain[: mix.image]]
        look = self.place("", True)

        def example(prompt: Placed, about: int, shown: str, picture: int | None) -> Example:
            return Example(prompt, self._truth(about), shown, picture)

        looked = [
            example(look, index, shown, i)
            for i, (index, (_, shown)) in enumerate(
                zip(answers + plain[: mix.image], seen, strict=True)
            )
        ]
        typed = [example(*self._typed(i, mix, rng), None) for i in plain]
        asked = [
            example(self.place(c.text, True), c.concept, c.ecr, len(seen) + i)
            for i, c in enumerate(changes)
        ]
        documents, queries = looked[: len(answers)], looked[len(answers) :]
        packed = self._packer.pack(
            documents + typed + queries + asked + self._coined(mix.coined, rng),
            rows=mix.rows,
            length=LENGTH,
            targets=mix.learnt,
        )
        if packed is None:
            return None
        rows = np.array([row for row, _ in seen] + [c.row for c in changes])
        asking = [*range(len(plain)), *range(mix.image), *range(len(plain), len(answers))]
        return Batch(
            pictures=np.stack([images.turned(self._data.images[r], rng) for r in rows]),
            picture_concepts=self._data.concept_ids[rows],
            packed=packed,
            concepts=self._table.concepts[answers],
            answers=np.array(asking, np.int32),
            proxies=np.concatenate([np.array(answers), np.array(answers)[asking]]).astype(np.int32),
        )

    def _truth(self, index: int) -> str:
        return self.reasonings.of(self._concept(index))

    def _document(self, index: int, mix: Mix, rng: np.random.Generator) -> tuple[int, str]:
        """(row, shown ECR), now and then of the drawing that is served."""
        row, shown = self._picture(index, mix, rng)
        if self._said is None and rng.random() < mix.served:
            row = self._served.get(index, row)
        return row, shown

    def _picture(self, index: int, mix: Mix, rng: np.random.Generator) -> tuple[int, str]:
        if self._said is not None and index in self._said.pictures and rng.random() < mix.own:
            said = self._said.pictures[index]
            own = said[rng.integers(len(said))]
            return own.row, own.ecr
        row = sampling.pick_row(self._table, index, rng)
        return row, self._maybe_wrong(index, mix.corrupt, rng)

    def _typed(self, index: int, mix: Mix, rng: np.random.Generator) -> tuple[Placed, int, str]:
        """(prompt, index, shown ECR) of a text query."""
        if self._said is not None and index in self._said.texts and rng.random() < mix.own:
            said = self._said.texts[index]
            own = said[rng.integers(len(said))]
            return self.place(own.text, False), index, own.ecr
        concept = self._concept(index)
        prompt = self.text_prompt(concept, rng)[0]
        if rng.random() < mix.echoed:
            return prompt, index, texts.echo(texts.label(concept))
        return prompt, index, self._maybe_wrong(index, mix.corrupt_text, rng)

    def _coined(self, count: int, rng: np.random.Generator) -> list[Example]:
        made = [texts.coined_query(self._vocabulary, rng) for _ in range(count)]
        return [Example(self.place(said, False), ecr, ecr, None) for said, ecr in made]

    def _concept(self, index: int) -> Concept:
        return self._data.concepts[self._table.concepts[index]]

    def text_prompt(self, concept: Concept, rng: np.random.Generator) -> tuple[Placed, str]:
        """A text query of at most 24 tokens with its template, and its text."""
        for _ in range(20):
            said = texts.text_query(concept, rng)
            if len(self.place(said, False).ids) <= 24:
                return self.place(said, False), said
        said = texts.label(concept)
        return self.place(said, False), said

    def _draw(self, count: int, mined: float, rng: np.random.Generator) -> np.ndarray:
        """Half at random, half as what is easily confused: a few groups of several concepts, each
        out of one subgroup, or a query's and those of its mined negatives."""
        at_random = rng.choice(len(self._table.concepts), count // 2, p=self._table.weights)
        chosen = [*at_random]
        while len(chosen) < count:
            room = min(6, count - len(chosen))
            if self._confused and rng.random() < mined:
                chosen += [*self._confused[rng.integers(len(self._confused))][:room]]
                continue
            seed = rng.choice(len(self._table.concepts), p=self._table.weights)
            siblings = self._subgroups[self._concept(int(seed)).subgroup]
            chosen += [*rng.permutation(siblings)[:room]]
        return rng.permutation(np.array(chosen))

    def changes(self, mix: Mix, rng: np.random.Generator) -> list[Own]:
        """Composed queries, each with the ECR to show; four of each drawn family stand together."""
        changes: list[Own] = []
        while len(changes) < mix.composed:
            room = min(4, mix.composed - len(changes))
            if self._said is not None and rng.random() < mix.own:
                said = self._said.changes[rng.integers(len(self._said.changes))]
                changes += [said[i] for i in rng.permutation(len(said))[:room]]
                continue
            family = self._families[rng.integers(len(self._families))]
            for target in rng.permutation(family)[:room]:
                source = int(rng.choice(family[family != target]))
                a, b = self._concept(source), self._concept(int(target))
                if texts.changed(a, b):
                    row = sampling.pick_row(self._table, source, rng)
                    shown = self._maybe_wrong(int(target), mix.corrupt, rng)
                    changes.append(Own(row, int(target), texts.change_query(a, b, rng), shown))
        return changes

    def _maybe_wrong(self, index: int, rate: float, rng: np.random.Generator) -> str:
        """The concept's ECR, or now and then that of something it may be mistaken for: mostly what
        looks alike, else another variant, another one of its kind, or anything."""
        concept = self._concept(index)
        if rng.random() >= rate:
            return self.reasonings.of(concept)
        draw = rng.random()
        assert self._lookalikes is not None, "a mix with wrong ECRs needs prototypes"
        if draw < 0.6:
            pool = self._lookalikes[index]
        elif draw < 0.75:
            pool = np.flatnonzero(self._table.family == self._table.family[index])
        elif draw < 0.95:
            pool = self._subgroups[concept.subgroup]
        else:
            pool = np.arange(len(self._table.concepts))
        return self.reasonings.of(self._concept(int(rng.choice(pool))))


class _Said:
    """What the model said, by table index: of pictures, of texts, and by family of changes."""

    def __init__(self, table: sampling.ImageTable, path: Path) -> None:
        place = {int(c): i for i, c in enumerate(table.concepts)}
        self.pictures: dict[int, list[Own]] = {}
        self.texts: dict[int, list[Own]] = {}
        changes: dict[int, list[Own]] = {}
        for line in json_lines(path.read_text()):
            said = Own(**json.loads(line))
            said = said._replace(concept=place[said.concept])
            if said.row < 0:
                self.texts.setdefault(said.concept, []).append(said)
            elif not said.text:
                self.pictures.setdefault(said.concept, []).append(said)
            else:
                changes.setdefault(int(table.family[said.concept]), []).append(said)
        self.changes = list(changes.values())


_NO_PATCHES = np.zeros((0, 0), np.float32)  # the trainer computes features by itself
