"""Qwen3 dense text models (the Qwen3-Reranker is one): reading their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tte_jax.models.config import ModelConfig, eos_ids, text_config


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    """`config.json` of a Qwen3 checkpoint."""
    tied = bool(raw.get("tie_word_embeddings", False))
    return ModelConfig(
        model_type="qwen3",
        text=text_config(
            raw,
            qkv_bias=bool(raw.get("attention_bias", False)),
            qk_norm=True,
            sections=False,
            tied=tied,
        ),
        eos_token_ids=eos_ids(raw, generation),
        pad_token_id=raw.get("pad_token_id"),
    )
