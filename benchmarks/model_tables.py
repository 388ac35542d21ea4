"""The table of the built-in models, read from their directories."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from tte_jax.builtin.models import NAMES, WEIGHTS_DIR


def models(weights: Path = WEIGHTS_DIR) -> str:
    """Family, shape, parameters and size of each; a line of text where there are no weights."""
    if not all((weights / name / "model.safetensors").is_file() for name in NAMES):
        return "*No weights in this checkout: `python -m training.builtin.export` writes them.*\n"
    rows = []
    for name in NAMES:
        folder = weights / name
        config = json.loads((folder / "config.json").read_text())
        spec = json.loads((folder / "tte.json").read_text())
        text = config.get("text_config", config)
        shape = f"{text['num_hidden_layers']} text layers, {text['hidden_size']} wide"
        if vision := config.get("vision_config"):
            shape = f"{vision['depth']} vision layers, {vision['embed_dim']} wide; {shape}"
        file = folder / "model.safetensors"
        parameters, size = _parameters(file) / 1e6, file.stat().st_size / 1e6
        roles, vocabulary = " and ".join(spec["role"]), f"{text['vocab_size']:,}"
        row = [f"`{name}`", f"`{config['model_type']}`", roles, shape, vocabulary]
        rows.append([*row, f"{parameters:.1f} M", f"{size:.1f} MB"])
    head = ["model", "family", "serves as", "shape", "vocabulary", "parameters", "file"]
    return table(head, rows)


def _parameters(file: Path) -> int:
    """Elements of all tensors, from the header: its length in 8 bytes, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
