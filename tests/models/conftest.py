"""Tiny checkpoints of the real architectures, saved by transformers, and its answers on them.

Freshly initialised weights are so small that every token gets nearly the same logits and greedy
decoding repeats one token: any implementation would agree. So all weights are drawn anew, large
enough that logits spread over several units, with norms and biases away from 1 and 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB = 160
PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO = 0, 1, 150, 151, 152, 153
PATCH_VALUES = 3 * 2 * 4 * 4


@dataclass(frozen=True)
class Checkpoint:
    """A directory and the reference model that was saved there."""

    path: Path
    model: PreTrainedModel

    @torch.no_grad()
    def answers(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(logits, post-norm last hidden state), both float32 [B, T, ...]."""
        inputs = self._inputs(batch)
        if hasattr(self.model, "rope_deltas"):  # state of an earlier generation
            self.model.model.rope_deltas = None
        hidden = self.model.model(**inputs).last_hidden_state
        return self.model.lm_head(hidden).numpy(), hidden.numpy()

    @torch.no_grad()
    def continuation(self, batch: dict[str, np.ndarray], tokens: int) -> np.ndarray:
        """[B, tokens] greedy continuation, `PAD` after an end of text."""
        inputs = self._inputs(batch)
        out = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
        )
        new = out[:, batch["input_ids"].shape[1] :].numpy()
        return np.pad(new, ((0, 0), (0, tokens - new.shape[1])), constant_values=PAD)

    def _inputs(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        inputs: dict[str, Any] = {k: torch.from_numpy(v) for k, v in batch.items()}
        if "pixel_values" in inputs or "pixel_values_videos" in inputs:
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs


def enliven(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw all parameters anew; see the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = 0.16 * noise  # 8 times the usual 0.02
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:
            value = 1 + 0.2 * noise
        parameter.data.copy_(value)
    return model.eval()


def qwen2_vl(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": PAD,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 48,
            "hidden_size": 64,
            "num_heads": 3,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return enliven(Qwen2VLForConditionalGeneration(config), seed)


def qwen3(*, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # not hidden_size / heads, as in the real 0.6B
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        bos_token_id=PAD,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return enliven(Qwen3ForCausalLM(config), seed)


def qwen2(*, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        bos_token_id=PAD,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return enliven(Qwen2ForCausalLM(config), seed)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": PAD,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "out_hidden_size": 64,
    "num_heads": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}


def qwen2_5_vl(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    # Windows of 2 x 2 merged patches, so that images of 3 have a cut window; one full block.
    vision = {"depth": 3, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 3}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**VISION, **vision},
        tie_word_embeddings=tied,
        **TOKENS,
    )
    return enliven(Qwen2_5_VLForConditionalGeneration(config), seed)


def qwen3_vl(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    # A position table of 5 x 5: no frame of the tests falls on its points only.
    vision = {"depth": 3, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 32,
            "rope_parameters": {**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        vision_config={**VISION, **vision},
        tie_word_embeddings=tied,
        **TOKENS,
    )
    return enliven(Qwen3VLForConditionalGeneration(config), seed)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2": qwen2,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3": qwen3,
    "qwen3_vl": qwen3_vl,
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Build and save once per kind: `saved("qwen2_vl", tied=True)`."""
    made: dict[tuple[str, bool], Checkpoint] = {}

    def get(family: str, *, tied: bool) -> Checkpoint:
        if (family, tied) not in made:
            model = FAMILIES[family](tied=tied)
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            made[family, tied] = Checkpoint(path, model)
        return made[family, tied]

    return get


def text_row(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(2, 150, length).tolist()


def picture(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, list[int]]:
    """Patches of a random image and the tokens that stand for it."""
    patches = rng.standard_normal((rows * columns, PATCH_VALUES)).astype(np.float32)
    return patches, [VISION_START, *[IMAGE] * (rows * columns // 4), VISION_END]


def padded(rows: list[list[int]], side: str) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, int64 [B, T], as a Hugging Face tokenizer pads."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), PAD, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def images_batch(side: str, seed: int = 1, *, end_with_text: bool = True) -> dict[str, np.ndarray]:
    """Four rows: two images of unequal shapes, one large image, text only, one small image."""
    rng = np.random.default_rng(seed)
    grids = [[1, 2, 6], [1, 8, 4], [1, 6, 10], [1, 2, 2]]
    images = [picture(rng, h, w) for _, h, w in grids]
    tail = 3 if end_with_text else 0
    rows = [
        text_row(rng, 2) + images[0][1] + text_row(rng, 3) + images[1][1] + text_row(rng, tail),
        text_row(rng, 1) + images[2][1] + text_row(rng, 2 * tail),
        text_row(rng, 7),
        images[3][1] + text_row(rng, tail),
    ]
    return {
        **padded(rows, side),
        "pixel_values": np.concatenate([patches for patches, _ in images]),
        "image_grid_thw": np.array(grids, np.int64),
    }


def videos_batch(family: str, side: str, seed: int = 3) -> dict[str, np.ndarray]:
    """Three rows: a video between images, text only, two videos of unequal speed."""
    rng = np.random.default_rng(seed)
    images, videos = [[1, 4, 6], [1, 2, 2]], [[3, 4, 2], [2, 2, 6], [2, 6, 4]]
    pictures = [picture(rng, h, w) for _, h, w in images]
    films = [film(rng, family, t, h, w) for t, h, w in videos]
    rows = [
        text_row(rng, 2) + pictures[0][1] + text_row(rng, 1) + films[0][1] + pictures[1][1] + [7],
        text_row(rng, 5),
        films[1][1] + text_row(rng, 2) + films[2][1] + text_row(rng, 2),
    ]
    batch = {
        **padded(rows, side),
        "pixel_values": np.concatenate([patches for patches, _ in pictures]),
        "image_grid_thw": np.array(images, np.int64),
        "pixel_values_videos": np.concatenate([patches for patches, _ in films]),
        "video_grid_thw": np.array(videos, np.int64),
    }
    if family == "qwen2_5_vl":
        batch["second_per_grid_ts"] = np.array([0.5, 1.3, 2.0], np.float32)
    return batch


def film(
    rng: np.random.Generator, family: str, frames: int, rows: int, columns: int
) -> tuple[np.ndarray, list[int]]:
    """Patches of a random video and its tokens; Qwen3-VL has every frame behind its time."""
    patches = rng.standard_normal((frames * rows * columns, PATCH_VALUES)).astype(np.float32)
    frame = [VIDEO] * (rows * columns // 4)
    if family == "qwen3_vl":
        tokens = [[20 + i, VISION_START, *frame, VISION_END] for i in range(frames)]
        return patches, sum(tokens, [])
    return patches, [VISION_START, *frame * frames, VISION_END]


def text_batch(side: str, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return padded([text_row(rng, n) for n in (11, 4, 23, 1)], side)
