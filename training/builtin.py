"""Shapes of the built-in models: the Qwen2-VL and Qwen3 architectures, small."""

from __future__ import annotations

from tte_jax.models.config import VisionConfig

SIDE = 112  # pixels; every built-in picture is 112 x 112, 64 patches, 16 vision tokens

VISION = VisionConfig(
    depth=6,
    embed_dim=192,
    heads=3,
    mlp_ratio=4,
    in_channels=3,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    out_size=256,
)
