"""Qwen2.5-VL: reading its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tte_jax.errors import PreconditionError
from tte_jax.models.config import (
    ModelConfig,
    WindowedVisionConfig,
    eos_ids,
    required,
    text_config,
)


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    """`config.json` of a Qwen2.5-VL checkpoint (flat as in transformers 4, or nested as in 5)."""
    text_raw = {**raw, **(raw.get("text_config") or {})}
    tied = bool(raw.get("tie_word_embeddings", text_raw.get("tie_word_embeddings", False)))
    text = text_config(text_raw, qkv_bias=True, qk_norm=False, sections=True, tied=tied)
    need = required(raw, "top level")
    vision = need("vision_config")
    v = required(vision, "vision_config")
    if vision.get("hidden_act", "silu") != "silu":
        raise PreconditionError(
            f"vision hidden_act {vision['hidden_act']!r} is not supported; expected 'silu'.",
            reason="MODEL_CONFIG_UNSUPPORTED",
        )
    return ModelConfig(
        model_type="qwen2_5_vl",
        text=text,
        vision=WindowedVisionConfig(
            depth=v("depth"),
            embed_dim=v("hidden_size"),
            heads=v("num_heads"),
            mlp_ratio=v("intermediate_size") / v("hidden_size"),
            in_channels=v("in_channels", "in_chans"),
            patch_size=v("patch_size"),
            temporal_patch_size=v("temporal_patch_size"),
            merge_size=v("spatial_merge_size"),
            out_size=v("out_hidden_size"),
            window_size=v("window_size"),
            full_blocks=tuple(v("fullatt_block_indexes")),
            tokens_per_second=v("tokens_per_second"),
        ),
        image_token_id=need("image_token_id"),
        video_token_id=need("video_token_id"),
        vision_start_token_id=need("vision_start_token_id"),
        eos_token_ids=eos_ids(raw, generation),
        pad_token_id=raw.get("pad_token_id", text_raw.get("pad_token_id")),
    )
