"""Qwen3-VL: reading its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tte_jax.errors import PreconditionError
from tte_jax.models.config import (
    DeepStackVisionConfig,
    ModelConfig,
    eos_ids,
    required,
    text_config,
)


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    """`config.json` of a Qwen3-VL checkpoint."""
    need = required(raw, "top level")
    text_raw = need("text_config")
    tied = bool(raw.get("tie_word_embeddings", text_raw.get("tie_word_embeddings", False)))
    text = text_config(
        text_raw,
        qkv_bias=bool(text_raw.get("attention_bias", False)),
        qk_norm=True,
        sections=True,
        interleaved=True,
        tied=tied,
    )
    vision = need("vision_config")
    v = required(vision, "vision_config")
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise PreconditionError(
            f"vision hidden_act {vision['hidden_act']!r} is not supported; expected"
            " 'gelu_pytorch_tanh'.",
            reason="MODEL_CONFIG_UNSUPPORTED",
        )
    side = math.isqrt(v("num_position_embeddings"))
    if side**2 != v("num_position_embeddings"):
        raise PreconditionError(
            f"num_position_embeddings must be a square; got {v('num_position_embeddings')}.",
            reason="MODEL_CONFIG_INVALID",
        )
    return ModelConfig(
        model_type="qwen3_vl",
        text=text,
        vision=DeepStackVisionConfig(
            depth=v("depth"),
            embed_dim=v("hidden_size"),
            heads=v("num_heads"),
            mlp_ratio=v("intermediate_size") / v("hidden_size"),
            in_channels=v("in_channels", "in_chans"),
            patch_size=v("patch_size"),
            temporal_patch_size=v("temporal_patch_size"),
            merge_size=v("spatial_merge_size"),
            out_size=v("out_hidden_size"),
            table_side=side,
            deepstack_blocks=tuple(v("deepstack_visual_indexes")),
        ),
        image_token_id=need("image_token_id"),
        video_token_id=need("video_token_id"),
        vision_start_token_id=need("vision_start_token_id"),
        eos_token_ids=eos_ids(raw, generation) or eos_ids(text_raw, None),
        pad_token_id=raw.get("pad_token_id", text_raw.get("pad_token_id")),
    )
