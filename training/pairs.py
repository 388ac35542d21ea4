"""Training batches of the unified model: three kinds of query, each with its document.

Everything here is host work on NumPy; a batch depends on (seed, step) alone. Sequences come from
the same `PromptSet` that serves the model, so what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from training import builtin, sampling, texts
from training.data.concepts import Concept
from training.data.emoji import EmojiData
from tte_jax.content import Content, Media, Side
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.positions import mrope_positions
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.template import Prompt
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.stages import ReasonItem

_PATCHES = builtin.SIDE // builtin.IMAGES.patch_size
GRID = (1, _PATCHES, _PATCHES)
FEATURES = _PATCHES**2 // builtin.IMAGES.merge_size**2  # merged patches of one picture
# Tokens of a sequence: prompt, ECR and both endings.
_SEEN_ROOM, _TEXT_ROOM, _COMPOSED_ROOM = 50 + FEATURES, 60, 62 + FEATURES
ECR_ROOM = 32  # tokens of an ECR that are learnt; one in a hundred has up to four more
_PICTURE = Media(b"picture")


# NumPy where a batch is made, traced inside a step.
Leaf = Any


@dataclass(frozen=True)
class Sequences:
    """A group of equally long sequences: prompt, ECR, `<|im_end|>`, pads, and a lone `<|im_end|>`.

    The last token sees the prompt only. It is the sequence's own "no reasoning" ending, so one
    pass yields the embedding with and without ECR.

    Attributes:
      ids: [B, T] int32.
      positions: [B, 3, T] int32.
      vis_idx: [B, T] int32, row of the vision table or -1.
      prompt: [B] int32, tokens of the prompt.
      end: [B] int32, index of the `<|im_end|>` that follows the ECR.
      targets: [B, ECR_ROOM] int32, the true ECR and its `<|im_end|>`.
      weights: [B, ECR_ROOM] float32, 0 where nothing is to be learnt (pads, corrupted ECRs).
    """

    ids: Leaf
    positions: Leaf
    vis_idx: Leaf
    prompt: Leaf
    end: Leaf
    targets: Leaf
    weights: Leaf


@dataclass(frozen=True)
class Batch:
    """One step. Queries are ordered text, image, composed.

    The first documents answer a text query each, and some of them an image query as well; the rest
    answer the composed queries.

    Attributes:
      pictures: [M, 112, 112, 3] uint8: documents, then image queries, then composed queries.
      picture_concepts: [M] int32.
      seen: the sequences of the documents, then of the image queries, which look alike.
      text, composed: the sequences of the other queries.
      concepts: [B] int32 concept of each document.
      answers: [Q] int32 document of each query.
      proxies: [B + Q] int32, which training concept each document, then each query, is about.
    """

    pictures: Leaf
    picture_concepts: Leaf
    seen: Sequences
    text: Sequences
    composed: Sequences
    concepts: Leaf
    answers: Leaf
    proxies: Leaf


@dataclass(frozen=True)
class Mix:
    """Queries of each kind in a batch (image ≤ text), and how often an ECR is a wrong one."""

    text: int = 56
    image: int = 8
    composed: int = 40
    corrupt: float = 0.35
    corrupt_text: float = 0.1


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


class PairSource:
    """Draws batches from the training split; `prototypes` as in `lookalikes`."""

    def __init__(
        self,
        data: EmojiData,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        *,
        prototypes: np.ndarray,
        seed: int,
    ) -> None:
        self._data = data
        self._seed = seed
        self._prompts = PromptSet(
            "mini", tokenizer, image_config, load=lambda media, path: (_NO_PATCHES, GRID)
        )
        self._table = sampling.image_table(data)
        self._lookalikes = lookalikes(prototypes, self._table.family)
        self.reasonings = texts.Reasonings(data.concepts)
        self._end = tokenizer.token_id("<|im_end|>")
        self._pad = tokenizer.token_id("<|endoftext|>")
        self._image = tokenizer.token_id("<|image_pad|>")
        self._video = tokenizer.token_id("<|video_pad|>")
        self._encode_ecr = lru_cache(None)(tokenizer.encode_tagged)
        self._prompt = lru_cache(200_000)(self._build_prompt)
        self._families = self._variants()
        self._subgroups = self._siblings()

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

    def labels(self, rows: int) -> Iterator[Sequences]:
        """The label of every training concept as a text query, `rows` at a time, padded at the
        end with the last one again."""
        prompts = [self._prompt(texts.label(c), False) for c in self._concepts()]
        prompts += [prompts[-1]] * (-len(prompts) % rows)
        for start in range(0, len(prompts), rows):
            some = prompts[start : start + rows]
            yield self.sequences(some, [""] * rows, [""] * rows, _TEXT_ROOM, None)

    def sequences(
        self,
        prompts: list[Prompt],
        truths: list[str],
        shown: list[str],
        room: int,
        first_picture: int | None,
    ) -> Sequences:
        """Lay out one group; picture i of the group is row `first_picture + i` of the pictures."""
        count = len(prompts)
        ids = np.full((count, room), self._pad, np.int32)
        positions = np.zeros((count, 3, room), np.int32)
        vis_idx = np.full((count, room), -1, np.int32)
        targets = np.full((count, ECR_ROOM), self._pad, np.int32)
        weights = np.zeros((count, ECR_ROOM), np.float32)
        lengths, ends = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for row, (prompt, truth, show) in enumerate(zip(prompts, truths, shown, strict=True)):
            n = len(prompt.ids)
            ecr = [*self._encode_ecr(show), self._end]
            right = [*self._encode_ecr(truth), self._end][:ECR_ROOM]
            if n + len(ecr) + 1 > room:
                raise ValueError(f"{n + len(ecr) + 1} tokens do not fit into {room}: {show!r}")
            ids[row, :n] = prompt.ids
            ids[row, n : n + len(ecr)] = ecr
            ids[row, -1] = self._end
            rows, following = self._place(prompt)
            positions[row, :, :n] = rows
            positions[row, :, n : n + len(ecr)] = following + np.arange(len(ecr))
            positions[row, :, -1] = following
            if first_picture is not None:
                where = np.flatnonzero(ids[row] == self._image)
                vis_idx[row, where] = (first_picture + row) * FEATURES + np.arange(FEATURES)
            lengths[row], ends[row] = n, n + len(ecr) - 1
            targets[row, : len(right)] = right
            weights[row, : len(right)] = float(show == truth)
        return Sequences(ids, positions, vis_idx, lengths, ends, targets, weights)

    def prompt_of(self, text: str, picture: bool) -> Prompt:
        """The reasoner's prompt for a text, a picture, or a picture with a change."""
        return self._prompt(text, picture)

    def _build_prompt(self, text: str, picture: bool) -> Prompt:
        parts = Content.of(text).parts if text else ()
        content = Content(((_PICTURE,) if picture else ()) + parts)
        return self._prompts.reason(ReasonItem(content, Side.QUERY))

    def _place(self, prompt: Prompt) -> tuple[np.ndarray, int]:
        grids = [GRID] if (prompt.ids == self._image).any() else []
        return mrope_positions(
            prompt.ids, grids, image_token_id=self._image, video_token_id=self._video, merge_size=2
        )

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
        concept_of = self._concept
        plain = [int(i) for i in self._draw(mix.text, rng)]
        pairs = self._changes(mix.composed, rng)
        looks = plain[: mix.image]
        answers = plain + [target for _, target in pairs]
        rows = [sampling.pick_row(self._table, i, rng) for i in answers]
        rows += [sampling.pick_row(self._table, i, rng) for i in looks]
        rows += [sampling.pick_row(self._table, source, rng) for source, _ in pairs]
        asked = [
            self._prompt(texts.change_query(concept_of(s), concept_of(t), rng), True)
            for s, t in pairs
        ]
        typed = [self._text_prompt(concept_of(i), rng) for i in plain]
        picture = self._prompt("", True)

        def shown(indices: list[int], rate: float) -> list[str]:
            return [self._maybe_wrong(i, rate, rng) for i in indices]

        def group(prompts: list[Prompt], of: slice, rate: float, room: int, first: int | None):
            return self.sequences(prompts, truths[of], shown(about[of], rate), room, first)

        count = len(answers)
        about = answers + looks
        truths = [self.reasonings.of(concept_of(i)) for i in about]
        pictures = np.asarray(rows)
        asking = np.concatenate(
            [np.arange(len(plain)), np.arange(len(looks)), np.arange(len(plain), count)]
        ).astype(np.int32)
        return Batch(
            pictures=self._data.images[pictures],
            picture_concepts=self._data.concept_ids[pictures],
            seen=group([picture] * len(about), slice(None), mix.corrupt, _SEEN_ROOM, 0),
            text=group(typed, slice(len(plain)), mix.corrupt_text, _TEXT_ROOM, None),
            composed=group(
                asked, slice(len(plain), count), mix.corrupt, _COMPOSED_ROOM, len(about)
            ),
            concepts=self._table.concepts[answers],
            answers=asking,
            proxies=np.concatenate([np.array(answers), np.array(answers)[asking]]).astype(np.int32),
        )

    def _concept(self, index: int) -> Concept:
        return self._data.concepts[self._table.concepts[index]]

    def _text_prompt(self, concept: Concept, rng: np.random.Generator) -> Prompt:
        for _ in range(20):
            prompt = self._prompt(texts.text_query(concept, rng), False)
            if len(prompt.ids) <= 24:
                return prompt
        return self._prompt(texts.label(concept), False)

    def _draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Half at random, half as look-alikes: a few subgroups with several concepts each."""
        at_random = rng.choice(len(self._table.concepts), count // 2, p=self._table.weights)
        chosen = [*at_random]
        while len(chosen) < count:
            seed = rng.choice(len(self._table.concepts), p=self._table.weights)
            siblings = self._subgroups[self._concept(int(seed)).subgroup]
            chosen += [*rng.permutation(siblings)[: min(6, count - len(chosen))]]
        return rng.permutation(np.array(chosen))

    def _changes(self, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(source, target) table indices; four pairs of each drawn family stand together."""
        pairs: list[tuple[int, int]] = []
        while len(pairs) < count:
            family = self._families[rng.integers(len(self._families))]
            targets = rng.permutation(family)[: min(4, count - len(pairs))]
            for target in targets:
                source = int(rng.choice(family[family != target]))
                if texts.changed(self._concept(source), self._concept(int(target))):
                    pairs.append((source, int(target)))
        return pairs

    def _maybe_wrong(self, index: int, rate: float, rng: np.random.Generator) -> str:
        """The concept's ECR, or now and then that of something it may be mistaken for: mostly what
        looks alike, else another variant, another one of its kind, or anything."""
        concept = self._concept(index)
        if rng.random() >= rate:
            return self.reasonings.of(concept)
        draw = rng.random()
        if draw < 0.6:
            pool = self._lookalikes[index]
        elif draw < 0.75:
            pool = np.flatnonzero(self._table.family == self._table.family[index])
        elif draw < 0.95:
            pool = self._subgroups[concept.subgroup]
        else:
            pool = np.arange(len(self._table.concepts))
        return self.reasonings.of(self._concept(int(rng.choice(pool))))


_NO_PATCHES = np.zeros((0, 0), np.float32)  # the trainer computes features by itself
