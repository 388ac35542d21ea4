"""Tiny random model directories of the served families, made on the spot and whole:
configuration, tokenizer, image processor, weights and `tte.json`."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import compile_cache
from tte_jax.embedder import Embedder
from tte_jax.engine.executables import enable_compile_cache
from tte_jax.engine.role import Role
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.weights import hf

R = TypeVar("R", bound=Role)

CONTROLS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
THINK_TAGS = ["<think>", "</think>"]
VOCABULARY = 512
CORPUS = [
    "user assistant What is this? Find: Change: Seen: Query: <Query>: <Document>: Answer:",
    "yes no yes no a smiling cat face with a dark skin tone the thing that is wanted",
] * 4

BUCKETS = {
    "images": [[4, 16]],
    "prefill": [[4, 32], [2, 64]],
    "embed": [[4, 32], [2, 64]],
    "prefix": [48],
    "score": [[4, 32], [2, 64]],
    "decode": [[2, 56], [4, 40]],
    "new_tokens": 24,
    "decode_steps": 4,
}


# What the towers of the later families have beside the common keys.
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 2,
        "window_size": 28,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "depth": 2,
        "patch_size": 16,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [0],
    },
}
# As released: the older family by its own type, the newer one with the frequencies taking turns.
ROPE: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "qwen3_vl": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
}
# Image processors as the authors' directories have them.
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"patch_size": 14, "min_pixels": 28 * 28, "max_pixels": 56 * 56},
    "qwen2_5_vl": {"patch_size": 14, "min_pixels": 28 * 28, "max_pixels": 56 * 56},
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def tokenizer(*, think_tags: bool = True) -> Tokenizer:
    """A byte-level BPE of 512 ids with the control tokens of the Qwen family."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    controls = CONTROLS + (THINK_TAGS if think_tags else [])
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(controls),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([AddedToken(c, special=True) for c in CONTROLS])
    if think_tags:
        bpe.add_tokens([AddedToken(t, special=False) for t in THINK_TAGS])
    return bpe


def write_model(
    directory: Path,
    *,
    family: str,
    roles: list[str],
    seed: int = 0,
    scale: float = 6.0,
    think_tags: bool = True,
    buckets: dict[str, Any] | None = None,
) -> Path:
    """A model directory with random weights.

    Args:
      family: "qwen2_vl", "qwen2_5_vl", "qwen3_vl" or "qwen3".
      scale: factor on all matrices; the default makes the outputs depend on every input.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bpe = tokenizer(think_tags=think_tags)
    bpe.save(str(directory / "tokenizer.json"))
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": bpe.token_to_id("<|im_end|>"),
    }
    config = {"model_type": family, **text}
    if family == "qwen2_vl":
        config |= {
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "image_token_id": bpe.token_to_id("<|image_pad|>"),
            "video_token_id": bpe.token_to_id("<|video_pad|>"),
            "vision_start_token_id": bpe.token_to_id("<|vision_start|>"),
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "in_channels": 3,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "hidden_size": 64,
            },
        }
    if family in VISION:
        config |= {
            "text_config": text | {"rope_scaling": ROPE[family]},
            "image_token_id": bpe.token_to_id("<|image_pad|>"),
            "video_token_id": bpe.token_to_id("<|video_pad|>"),
            "vision_start_token_id": bpe.token_to_id("<|vision_start|>"),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "num_heads": 2,
                "in_channels": 3,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                **VISION[family],
            },
        }
    if family in PROCESSORS:
        processor = json.dumps(PROCESSORS[family])
        (directory / "preprocessor_config.json").write_text(processor)
    (directory / "config.json").write_text(json.dumps(config))
    spec = {"format": 1, "prompts": "mini", "role": roles, "name": f"tiny-{family}"}
    spec["buckets"] = {**BUCKETS, **(buckets or {})}
    (directory / "tte.json").write_text(json.dumps(spec))
    hf.export(random_model(directory, seed=seed, scale=scale), directory)
    return directory


def random_model(directory: Path, *, seed: int = 0, scale: float = 6.0) -> MultimodalLM:
    """A model of the directory's configuration with matrices of deviation 0.02 * `scale`.

    Drawn with NumPy: JAX would compile one program for every shape.
    """
    config = model_config(directory)
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            return jnp.asarray(np.zeros(leaf.shape, np.float32))
        if "norm" in name:
            return jnp.asarray(np.ones(leaf.shape, np.float32))
        return jnp.asarray(rng.normal(0, 0.02 * scale, leaf.shape).astype(np.float32))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def png(seed: int, width: int = 56, height: int = 56) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@cache
def root() -> Path:
    """A directory of this test session, gone at its end."""
    path = Path(tempfile.mkdtemp(prefix="tte-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    enable_compile_cache(compile_cache.directory())
    return path


@cache
def vl_dir() -> Path:
    """A Qwen2-VL that reasons and embeds."""
    return write_model(root() / "vl", family="qwen2_vl", roles=["reasoner", "embedder"])


@cache
def text_dir() -> Path:
    """A Qwen3 that reranks."""
    return write_model(root() / "text", family="qwen3", roles=["reranker"], seed=1)


@cache
def reasoner() -> Reasoner:
    """One warm reasoner for the whole session; tests leave it idle."""
    return _warm(Reasoner.from_pretrained(vl_dir()))


@cache
def embedder() -> Embedder:
    """One warm embedder for the whole session."""
    return _warm(Embedder.from_pretrained(vl_dir()))


@cache
def reranker() -> Reranker:
    """One warm reranker for the whole session."""
    return _warm(Reranker.from_pretrained(text_dir()))


def _warm(role: R) -> R:
    role.warmup()
    atexit.register(role.close)
    return role
