"""A real, small byte-level BPE tokenizer of the Qwen2 make, saved as Hugging Face saves it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTROLS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CORPUS = [
    "user assistant system What is this? Find: Change: Seen: Query: Document Instruct Answer:",
    "yes no yes no a smiling cat face with a dark skin tone é ü 日本語 the thing that is wanted",
] * 4


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Under "tags", think tags are tokens, as in Qwen3; under "plain" not, as in Qwen2-VL."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    root = tmp_path_factory.mktemp("tokenizers")
    bpe.model.save(str(root))
    result = {}
    for name in ("tags", "plain"):
        tokenizer = Qwen2Tokenizer(
            vocab=str(root / "vocab.json"),
            merges=str(root / "merges.txt"),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            unk_token=None,
        )
        tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS})
        if name == "tags":
            tokenizer.add_tokens(["<think>", "</think>"])  # not special, as Qwen3 has them
        result[name] = root / name
        tokenizer.save_pretrained(result[name])
    return result
