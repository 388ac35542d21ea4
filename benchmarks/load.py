"""Host memory that loading takes: its peak against the weights themselves.

    python -m benchmarks.load

Writes a random Qwen3 checkpoint in bfloat16 (1.2 GB by default) into a temporary folder and loads
it in a child process for each dtype. The peak is that of the resident set above what it was before,
mapped files included; on a CPU the loaded weights are part of it, so 1 is the least there can be.
Ends with 1 when a ratio is above the limit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file

from benchmarks import environment

LIMIT = 1.4
DTYPES = ("bfloat16", "float32")
SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Config:
    """Options; the default shape is that of Qwen3-0.6B.

    Attributes:
      layers, width, vocabulary: of the checkpoint.
      folder: where the checkpoint is written for the time of the run; empty = the system's.
      out: the result.
    """

    layers: int = 28
    width: int = 1024
    vocabulary: int = 151_936
    folder: str = ""
    out: Path = Path("benchmarks/results/load.json")


def main(config: Config) -> int:
    load = environment.foreign_load()
    about = environment.describe("benchmarks.load")
    loads: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="tte-load-", dir=config.folder or None) as made:
        parameters, size = write_checkpoint(Path(made), config)
        for dtype in DTYPES:
            # A fresh process each: a peak is that of a process's whole life.
            with get_context("spawn").Pool(1) as child:
                loads[dtype] = child.apply(measure, (made, dtype))
            print(f"{dtype}: {loads[dtype]}", flush=True)
    result = about | {
        "noisy": environment.noisy(load),
        "foreign_load": {"before": load},
        "parameters": parameters,
        "file_bytes": size,
        "file_dtype": "bfloat16",
        "limit": LIMIT,
        "loads": loads,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    return int(any(figures["ratio"] > LIMIT for figures in loads.values()))


def measure(directory: str, dtype: str) -> dict[str, Any]:
    """Loads the checkpoint; run in a process that has done nothing yet."""
    import jax
    import jax.numpy as jnp

    from tte_jax.weights import hf

    jnp.zeros(1).block_until_ready()  # the backend is there before the baseline is taken
    baseline = _memory("VmRSS")
    began = time.perf_counter()
    model = hf.load(directory, dtype=jnp.dtype(dtype))
    seconds = time.perf_counter() - began
    peak = _memory("VmHWM") - baseline
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {
        "weights_bytes": weights,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "ratio": round(peak / weights, 3),
        "seconds": round(seconds, 2),
    }


def write_checkpoint(folder: Path, config: Config) -> tuple[int, int]:
    """A tied Qwen3 in several files with an index; returns its parameters and bytes.

    Its values repeat (loading does not look at them), so that it is written at the disk's speed.
    """
    raw = {
        "model_type": "qwen3",
        "hidden_size": config.width,
        "intermediate_size": 3 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // 64,
        "num_key_value_heads": config.width // 128,
        "head_dim": 128,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    values = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    parameters = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in _tensors(folder).items():
        shard[name] = np.resize(values, shape)
        parameters += prod(shape)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parameters, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape in the files, of a text model."""
    from tte_jax.models.registry import model_config
    from tte_jax.weights.table import entries

    config = model_config(folder)
    layers = range(config.text.layers)
    return {
        entry.name.format(l=layer): entry.hf_shape
        for entry in entries(config)
        for layer in (layers if entry.stacked else range(1))
    }


def _memory(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
