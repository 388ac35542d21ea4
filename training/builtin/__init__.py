"""Shapes of the built-in models: the Qwen2-VL and Qwen3 architectures, small."""

from __future__ import annotations

from tte_jax.models.config import ModelConfig, TextConfig, VisionConfig
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.tokenizer import Tokenizer

VOCABULARY = 4096
SERVED_STYLE = "openmoji"
SIDE = 56  # pixels; every picture is resized to 56 x 56: 16 patches, 4 vision tokens

IMAGES = ImageConfig(
    patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=SIDE**2, max_pixels=SIDE**2
)

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


def _text(*, layers: int, inner: int, qwen3: bool) -> TextConfig:
    sections = (8, 12, 12)  # time, height, width: half of head_dim in all
    axes = tuple(axis for axis, n in enumerate(sections) for _ in range(n))
    return TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=inner,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=64,
        rms_eps=1e-6,
        rope_theta=10_000.0,
        rope_axes=(0,) * 32 if qwen3 else axes,
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        tied=True,
    )


def unified_config(tokenizer: Tokenizer) -> ModelConfig:
    """tte-mini-vl: reasoner and embedder in one Qwen2-VL."""
    return ModelConfig(
        model_type="qwen2_vl",
        text=_text(layers=4, inner=640, qwen3=False),
        vision=VISION,
        image_token_id=tokenizer.token_id("<|image_pad|>"),
        video_token_id=tokenizer.token_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_id("<|vision_start|>"),
        eos_token_ids=(tokenizer.token_id("<|im_end|>"),),
        pad_token_id=tokenizer.token_id("<|endoftext|>"),
    )


def reranker_config(tokenizer: Tokenizer) -> ModelConfig:
    """tte-mini-reranker: a Qwen3 text model that says yes or no."""
    return ModelConfig(
        model_type="qwen3",
        text=_text(layers=4, inner=640, qwen3=True),
        eos_token_ids=(tokenizer.token_id("<|im_end|>"),),
        pad_token_id=tokenizer.token_id("<|endoftext|>"),
    )
