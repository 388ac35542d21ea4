"""Random models of about 110 million parameters that both sides load from the same directory.

They have the built-in models' tokenizer and prompts, so that every input is a real one; compute,
not dispatch, is most of their cost.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from training import builtin
from training.builtin.export import config_json
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.models.config import ModelConfig, TextConfig
from tte_jax.models.registry import model_config
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.weights.table import entries

LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 14, 768, 2304, 12, 4
LARGEST = 224  # pixels of the side of a square image

BUCKETS: dict[str, Any] = {
    "images": [[1, 16], [8, 16], [1, 64], [8, 64], [1, 256], [4, 256]],
    "prefill": [[1, 32], [1, 64], [1, 128], [2, 128], [4, 128]],
    "embed": [[1, 64], [1, 128], [1, 256], [4, 256]],
    "prefix": [64, 400, 512],
    "score": [[25, 32], [25, 64], [25, 100]],
    "decode": [[1, 112], [4, 112], [8, 160], [16, 112], [16, 160]],
    "new_tokens": 96,
}


def write_vl(folder: Path) -> Path:
    """A Qwen2-VL that reasons and embeds."""
    tokenizer = Tokenizer.from_dir(WEIGHTS_DIR / REASONER)
    small = builtin.unified_config(tokenizer)
    assert small.vision is not None
    vision = replace(small.vision, embed_dim=384, heads=6, out_size=WIDTH)
    config = replace(small, text=_wide(small.text), vision=vision)
    return _write(folder, config, WEIGHTS_DIR / REASONER, ["reasoner", "embedder"])


def write_text(folder: Path) -> Path:
    """A Qwen3 that reranks."""
    small = builtin.reranker_config(Tokenizer.from_dir(WEIGHTS_DIR / RERANKER))
    config = replace(small, text=_wide(small.text))
    return _write(folder, config, WEIGHTS_DIR / RERANKER, ["reranker"])


def parameters(folder: Path) -> int:
    """How many values the model's files hold."""
    return sum(
        int(np.prod(entry.hf_shape)) * (_layers(entry.path, folder) if entry.stacked else 1)
        for entry in entries(model_config(folder))
    )


def _wide(text: TextConfig) -> TextConfig:
    return replace(
        text,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
    )


def _write(folder: Path, config: ModelConfig, like: Path, roles: list[str]) -> Path:
    """The model, unless the folder has it: `tte.json` is written last of all."""
    raw = config_json(config) | {"dtype": "float32"}
    spec = {
        "format": 1, "prompts": "mini", "role": roles, "name": folder.name, "buckets": BUCKETS,
        "config": hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip
    if (folder / "tte.json").is_file() and json.loads((folder / "tte.json").read_text()) == spec:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(like / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    if config.vision is not None:
        processor = json.loads((like / "preprocessor_config.json").read_text())
        processor["size"]["longest_edge"] = LARGEST**2
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries(model_config(folder)):
        for layer in range(_layers(entry.path, folder) if entry.stacked else 1):
            if "norm" in entry.path and "bias" not in entry.path:
                value = np.ones(entry.hf_shape)
            elif "bias" in entry.path:
                value = np.zeros(entry.hf_shape)
            else:
                value = rng.normal(0, 0.02, entry.hf_shape)
            tensors[entry.name.format(l=layer)] = value.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tte.json").write_text(json.dumps(spec))
    return folder


def _layers(path: str, folder: Path) -> int:
    config = model_config(folder)
    if path.startswith("visual"):
        assert config.vision is not None
        return config.vision.depth
    return config.text.layers
