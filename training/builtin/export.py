"""Write trained weights as the model directories that ship in the wheel.

    python -m training.builtin.export --version 1

Each is a complete Hugging Face directory (transformers loads it too) plus `tte.json`, which names
the prompts it was trained on. Weights are bfloat16: half the size, and exact again in float32.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import load_file, save_file

from training import builtin
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.models.config import ModelConfig, TextConfig
from tte_jax.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Options: which weights to take, where to put the directories, and their version."""

    unified: Path = Path(".data/runs/unified/export")
    reranker: Path | None = Path(".data/runs/rerank/export")
    tokenizer: Path = Path(".data/runs/tokenizer")
    out: Path = WEIGHTS_DIR
    version: str = "1"


def text_json(c: TextConfig, config: ModelConfig) -> dict[str, Any]:
    """The text part of a config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if config.vision is not None:
        rope["mrope_section"] = [c.rope_axes.count(axis) for axis in range(3)]
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": c.rms_eps,
        "rope_parameters": rope,
        "use_sliding_window": False,
        "tie_word_embeddings": c.tied,
        "eos_token_id": config.eos_token_ids[0],
        "bos_token_id": None,
        "pad_token_id": config.pad_token_id,
    }


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A whole config.json of either family."""
    text = text_json(config.text, config)
    if config.vision is None:
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": config.text.qkv_bias,
            "dtype": "bfloat16",
            **text,
        }
    v = config.vision
    return {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "tie_word_embeddings": config.text.tied,
        "pad_token_id": config.pad_token_id,
        "text_config": {"model_type": "qwen2_vl_text", **text},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": v.depth,
            "embed_dim": v.embed_dim,
            "num_heads": v.heads,
            "mlp_ratio": v.mlp_ratio,
            "in_channels": v.in_channels,
            "hidden_size": v.out_size,
            "hidden_act": "quick_gelu",
            "patch_size": v.patch_size,
            "temporal_patch_size": v.temporal_patch_size,
            "spatial_merge_size": v.merge_size,
        },
    }


def write(
    directory: Path, config: ModelConfig, weights: Path, tokenizer: Path, tte: dict[str, Any]
) -> None:
    """One model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(weights / "model.safetensors")
    half = {k: np.ascontiguousarray(v.astype(ml_dtypes.bfloat16)) for k, v in tensors.items()}
    save_file(half, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    files: dict[str, Any] = {
        "config.json": config_json(config),
        "generation_config.json": {
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "do_sample": False,
        },
        "tte.json": tte,
    }
    if config.vision is not None:
        files["preprocessor_config.json"] = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {
                "shortest_edge": builtin.IMAGES.min_pixels,
                "longest_edge": builtin.IMAGES.max_pixels,
            },
            "patch_size": builtin.IMAGES.patch_size,
            "temporal_patch_size": builtin.IMAGES.temporal_patch_size,
            "merge_size": builtin.IMAGES.merge_size,
            "image_mean": list(builtin.IMAGES.mean),
            "image_std": list(builtin.IMAGES.std),
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
        }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    size = (directory / "model.safetensors").stat().st_size / 1e6
    print(
        f"{directory}: {sum(v.size for v in half.values()) / 1e6:.2f} M parameters, {size:.1f} MB"
    )


def main(config: Config) -> None:
    tokenizer = Tokenizer.from_dir(config.tokenizer)

    # The ladder fits what these models read: a picture is 16 patches and its prompt 18 tokens, an
    # ECR about 21 and at most 35, and ten candidates are reranked; long texts and very long or tall
    # pictures take the larger ones. A query alone has small shapes; of a corpus on its way in,
    # seven prompts share a row of 128.
    buckets: dict[str, Any] = {
        "images": [[1, 16], [8, 16], [1, 64]],
        "prefill": [[1, 32], [1, 64], [1, 128], [2, 128], [4, 128]],
        "embed": [[1, 48], [1, 128], [8, 128], [1, 256]],
        "prefix": [48, 256],
        "score": [[10, 32], [4, 64], [4, 128]],
    }
    tte = {"format": 1, "prompts": "mini", "version": config.version, "buckets": buckets}
    write(
        config.out / REASONER,
        builtin.unified_config(tokenizer),
        config.unified,
        config.tokenizer,
        {**tte, "name": REASONER, "role": ["reasoner", "embedder"]},
    )
    if config.reranker is not None:
        write(
            config.out / RERANKER,
            builtin.reranker_config(tokenizer),
            config.reranker,
            config.tokenizer,
            {**tte, "name": RERANKER, "role": ["reranker"]},
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
