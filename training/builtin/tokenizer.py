"""The built-in models' tokenizer: Qwen2's kind (byte-level BPE), trained on the texts we have.

python -m training.builtin.tokenizer --data .data/emoji --out .data/runs/tokenizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from training.builtin import texts
from training.data.emoji import load

VOCABULARY = 4096
# Qwen's cut into words: contractions, letters with one leading mark, single digits, punctuation.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Config:
    """Options: the emoji data set, the output folder, the seed of the sampled texts."""

    data: Path = Path(".data/emoji")
    out: Path = Path(".data/runs/tokenizer")
    seed: int = 0


def main(config: Config) -> None:
    concepts = load(config.data).concepts
    rng = np.random.default_rng(config.seed)
    reasonings = texts.Reasonings(concepts)
    lines = ["user\nassistant\nsystem\n", "<Query>: ", "<Document>:", " yes no", "yes", "no"] * 500
    lines += ["What is this?", "Find: ", "Change: ", "Seen: ", "\nQuery: ", "\nAnswer: "] * 500
    lines += ["\nSummary: ", "Answer:"] * 500
    for concept in concepts:
        ecr = reasonings.of(concept)
        think, answer = ecr.removeprefix("<think>").split("</think>")
        lines += [think, answer, " " + texts.label(concept), *(" " + t for t in concept.tags)]
        lines += [f"Find: {texts.text_query(concept, rng)}" for _ in range(4)]
        if concept.skin != "none" or concept.gender != "none":
            lines += [f"Change: {texts.change_query(concept, concept, rng)}" for _ in range(2)]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    config.out.mkdir(parents=True, exist_ok=True)
    wrapped = Qwen2Tokenizer(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # pyright: ignore[reportArgumentType]  # bytes leave nothing unknown
        bos_token=None,
        additional_special_tokens=list(SPECIAL[1:]),
    )
    wrapped.save_pretrained(config.out)
    backend.save(str(config.out / "tokenizer.json"))
    print(f"{backend.get_vocab_size()} tokens in {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
