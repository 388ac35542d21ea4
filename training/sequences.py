"""Examples as the sequences that models read, and as the labels that the loss needs. Host only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from training.batches import Item
from training.contrastive_loss import Labels
from training.data.examples import Document, Example
from tte_jax.content import Content, Side, Text
from tte_jax.engine.inputs import ModelInput, model_input
from tte_jax.errors import InvalidInputError
from tte_jax.models.config import ModelConfig
from tte_jax.preprocess.prompts import EmbedMode, PromptSet
from tte_jax.preprocess.template import IM_END
from tte_jax.stages import EmbedItem, ReasonItem


@dataclass(frozen=True)
class Counts:
    """P positives and K negatives of a query; what an example has less is masked, more is cut."""

    positives: int = 1
    negatives: int = 0

    @property
    def vectors(self) -> int:
        """Of each query: its own and its documents'."""
        return 1 + self.positives + self.negatives


class Sequences:
    """Documents → sequences of at most `longest` tokens, worded as the roles word them.

    Too long a sequence loses words of its ECR first, then of its text, from the end.
    """

    def __init__(
        self,
        prompts: PromptSet,
        config: ModelConfig,
        *,
        longest: int,
        mode: EmbedMode = EmbedMode.WHOLE,
    ) -> None:
        self.prompts, self.config, self.longest, self.mode = prompts, config, longest, mode

    def embedding(self, document: Document, side: Side) -> ModelInput:
        """What the embedder reads of it.

        Raises:
          InvalidInputError: empty content; media alone are too long.
        """

        def made(one: Document) -> ModelInput:
            item = EmbedItem(one.content, side, one.ecr, one.instruction)
            return model_input(self.prompts.embed(item, mode=self.mode), self.config)

        one = made(document)
        while one.tokens > self.longest:
            document = shorter(document, self.longest / one.tokens, self.longest)
            one = made(document)
        return one

    def reasoning(self, document: Document, side: Side) -> Item:
        """The reasoner's prompt and the ECR to learn after it; the prompt carries no loss.

        Raises:
          InvalidInputError: no ECR; the prompt alone is too long.
        """
        if not document.ecr.strip():
            raise InvalidInputError(f"document {document.key} has no ECR to learn", field="ecr")
        item = ReasonItem(document.content, side, document.instruction)
        prompt = self.prompts.reason(item)
        tokenizer = self.prompts.tokenizer
        answer = [*tokenizer.encode_tagged(document.ecr.strip()), tokenizer.token_id(IM_END)]
        start, room = len(prompt.ids), self.longest - len(prompt.ids)
        if room < 2:
            raise InvalidInputError(
                f"document {document.key}: the prompt takes {start} of {self.longest} tokens;"
                " raise packing.lengths, or make its text or media smaller",
                field="packing.lengths",
            )
        # What is cut off has no end of turn to learn.
        ids = np.concatenate([prompt.ids, np.array(answer[:room], np.int32)])
        one = model_input(replace(prompt, ids=ids), self.config)
        learnt = np.zeros(len(ids), np.float32)
        learnt[start - 1 : len(ids) - 1] = 1
        return Item(one, learnt=learnt)


def shorter(document: Document, share: float, limit: int) -> Document:
    """The document with about `share` of its words: the ECR's go first, then the text's.

    Raises InvalidInputError when there are no words left to cut.
    """
    if document.ecr.strip():
        return replace(document, ecr=_cut(document.ecr, share))
    texts = [i for i, p in enumerate(document.content.parts) if isinstance(p, Text)]
    sizes = {i: len(_text(document.content, i)) for i in texts}
    most = max(sizes, key=lambda i: sizes[i], default=None)
    if most is None or sizes[most] < 2:
        raise InvalidInputError(
            f"document {document.key} is longer than {limit} tokens without any text; make its"
            " media smaller, or raise packing.lengths",
            field="packing.lengths",
        )
    parts = list(document.content.parts)
    parts[most] = Text(_cut(_text(document.content, most), share) or "…")
    return replace(document, content=Content(tuple(parts)))


def _cut(text: str, share: float) -> str:
    """The first words; of a text without spaces, as Chinese is written, the first characters."""
    words, share = text.split(), share * 0.9
    if len(words) < 2:
        return text.strip()[: int(len(text.strip()) * share)]
    return " ".join(words[: int(len(words) * share)])


def _text(content: Content, part: int) -> str:
    one = content.parts[part]
    assert isinstance(one, Text)
    return one.text


def embedding_items(
    examples: Sequence[Example], counts: Counts, sequences: Sequences, pool: Executor
) -> list[Item]:
    """The sequences of one shard: queries, then positives, then negatives, by `dest`."""
    rows, asked = len(examples), []
    for i, example in enumerate(examples):
        asked.append((example.query, Side.QUERY, i))
        for p, document in enumerate(example.positives[: counts.positives]):
            asked.append((document, Side.DOCUMENT, rows + i * counts.positives + p))
        first = rows * (1 + counts.positives) + i * counts.negatives
        for k, document in enumerate(example.negatives[: counts.negatives]):
            asked.append((document, Side.DOCUMENT, first + k))
    inputs = pool.map(lambda a: sequences.embedding(a[0], a[1]), asked)
    return [Item(one, dest) for one, (_, _, dest) in zip(inputs, asked, strict=True)]


def reasoning_items(
    examples: Sequence[Example], sides: str, sequences: Sequences, pool: Executor
) -> list[Item]:
    """The reasoner's sequences of one shard: every side that has an ECR, of each example each
    document once. What examples share is learnt with each, wherever a mesh puts them.

    Args:
      sides: "query", "document" or "both".
    """
    asked = [one for example in examples for one in reasoned(example, sides)]
    return list(pool.map(lambda a: sequences.reasoning(*a), asked))


def reasoned(example: Example, sides: str) -> list[tuple[Document, Side]]:
    """What of an example has an ECR to learn."""
    asked = [(example.query, Side.QUERY)] if sides != "document" else []
    if sides != "query":
        once = {document.key: document for document in reversed(example.positives)}
        asked += [(document, Side.DOCUMENT) for document in reversed(once.values())]
    return [(document, side) for document, side in asked if document.ecr.strip()]


def labels_of(examples: Sequence[Example], counts: Counts) -> Labels:
    """What the loss must know of the examples of one shard, as NumPy arrays."""
    b, p, k = len(examples), counts.positives, counts.negatives
    made = Labels(
        weight=np.ones(b, np.float32),
        group=np.zeros((b, 2), np.uint32),
        positive_key=np.zeros((b, p, 2), np.uint32),
        positive_mask=np.zeros((b, p), bool),
        negative_key=np.zeros((b, k, 2), np.uint32),
        negative_mask=np.zeros((b, k), bool),
        positive_score=np.full(b, np.nan, np.float32),
        negative_score=np.full((b, k), np.nan, np.float32),
    )
    for i, example in enumerate(examples):
        if example.group:
            # A group is the data set's own: equal names elsewhere mean nothing.
            made.group[i] = hashed(f"{example.dataset}\0{example.group}")
        for j, document in enumerate(example.positives[:p]):
            made.positive_key[i, j], made.positive_mask[i, j] = hashed(document.key), True
        for j, document in enumerate(example.negatives[:k]):
            made.negative_key[i, j], made.negative_mask[i, j] = hashed(document.key), True
        if example.positive_score is not None:
            made.positive_score[i] = example.positive_score
        scores = example.negative_scores[:k]
        made.negative_score[i, : len(scores)] = scores
    return made


def hashed(key: str) -> tuple[int, int]:
    """64 bits of a key as two uint32; never (0, 0) in practice, which stands for no group."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def without_ecr(example: Example, share: float, seed: tuple[int, ...]) -> Example:
    """The example with the ECR of each side left out with probability `share`; same seed, same."""
    rng = np.random.default_rng(seed)
    documents = [example.query, *example.positives, *example.negatives]
    kept = [replace(d, ecr="") if rng.random() < share else d for d in documents]
    first = 1 + len(example.positives)
    return replace(
        example, query=kept[0], positives=tuple(kept[1:first]), negatives=tuple(kept[first:])
    )
