"""Qwen2 and Qwen2.5 dense text models: reading their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tte_jax.models.config import ModelConfig, eos_ids, text_config


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    """`config.json` of a Qwen2 checkpoint."""
    tied = bool(raw.get("tie_word_embeddings", False))
    return ModelConfig(
        model_type="qwen2",
        text=text_config(raw, qkv_bias=True, qk_norm=False, sections=False, tied=tied),
        eos_token_ids=eos_ids(raw, generation),
        pad_token_id=raw.get("pad_token_id"),
    )
