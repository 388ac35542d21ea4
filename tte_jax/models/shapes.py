"""Published shapes by name, for planning without a checkpoint: their `config.json`, no weights."""

from __future__ import annotations

from typing import Any

from tte_jax.errors import NotFoundError
from tte_jax.models import qwen2_vl
from tte_jax.models.config import ModelConfig


def _qwen2_vl(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "num_heads": 16,
            "mlp_ratio": 4,
            "in_chans": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "hidden_size": hidden,
        },
    }


QWEN2_VL = {
    "2B": _qwen2_vl(1536, 8960, 28, 12, 2, 151_936, True),
    "7B": _qwen2_vl(3584, 18_944, 28, 28, 4, 152_064, False),
    "72B": _qwen2_vl(8192, 29_568, 80, 64, 8, 152_064, False),
}


def shape_config(name: str) -> ModelConfig:
    """The configuration of Qwen2-VL in one of its published sizes.

    Raises:
      NotFoundError: no such size.
    """
    if name not in QWEN2_VL:
        raise NotFoundError(
            f"No published shape {name!r}; there are {', '.join(QWEN2_VL)} (Qwen2-VL). For another"
            " model give a directory with its config.json.",
            reason="MODEL_NOT_FOUND",
        )
    return qwen2_vl.parse(QWEN2_VL[name], None)
