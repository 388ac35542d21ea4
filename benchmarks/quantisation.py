"""What int8 weights cost and bring: embeddings, speed and memory against full precision.

    python -m benchmarks.quantisation

Two models in float32, each with its own weights and with `quantise="int8"`: the built-in embedder
on real labels and pictures, and a random Qwen3 of 100 million parameters on random tokens. Times
are medians of rounds in which the two take turns, of one forward pass: a batch of embeddings, and
one token, which is mostly the reading of weights. On a CPU the ratio of the two is that of the
process's own CPU time, which other work on the machine hardly disturbs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import tte_jax
from benchmarks import environment
from tte_jax.builtin import openmoji
from tte_jax.builtin.models import EMBEDDER, path_of
from tte_jax.content import Content, Side
from tte_jax.engine import programs
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.template import Prompt
from tte_jax.stages import EmbedItem
from tte_jax.weights import hf

SHAPES = {"batch of 4 x 64 tokens": (4, 64), "one token": (1, 1)}
RANDOM = {
    "model_type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      rows: labels, and pictures, that are embedded; of the random model, sequences.
      rounds: in which the two precisions take turns.
      out: the result.
    """

    rows: int = 64
    rounds: int = 15
    out: Path = Path("benchmarks/results/quantisation.json")


def main(config: Config) -> int:
    load = environment.foreign_load()
    about = environment.describe("benchmarks.quantisation")
    models: dict[str, Any] = {}
    builtin = path_of(EMBEDDER)
    models[builtin.name] = compare(builtin, builtin_batches(builtin, config.rows), config)
    with tempfile.TemporaryDirectory(prefix="tte-int8-") as made:
        write_random(Path(made))
        batches = {"random tokens": random_batch(config.rows)}
        models["random Qwen3, 100 M"] = compare(Path(made), batches, config)
    result = about | {
        "noisy": environment.noisy(load),
        "foreign_load": {"before": load},
        "models": models,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    return 0


def compare(
    path: Path, batches: dict[str, dict[str, np.ndarray]], config: Config
) -> dict[str, Any]:
    """One model with its own weights and with int8 ones."""
    both = {"float32": tte_jax.load_model(path), "int8": tte_jax.load_model(path, quantise="int8")}
    cosines = {}
    for name, batch in batches.items():
        full, int8 = (embeddings(model, batch) for model in both.values())
        each = (full * int8).sum(-1)
        cosines[name] = {
            "rows": len(each),
            "mean": round(float(each.mean()), 6),
            "least": round(float(each.min()), 6),
        }
    size = {n: sum(w.nbytes for w in jax.tree.leaves(m.module)) for n, m in both.items()}
    modules = {name: model.module for name, model in both.items()}
    times = {name: forward_ms(modules, *shape, config.rounds) for name, shape in SHAPES.items()}
    clock = "cpu" if jax.default_backend() == "cpu" else "wall"
    found = {
        "parameters": sum(prod(w.shape) for w in jax.tree.leaves(modules["float32"])),
        "bytes": size,
        "memory_ratio": round(size["int8"] / size["float32"], 3),
        "cosine": cosines,
        "forward_ms": times,
        "clock_of_the_ratio": clock,
        "speed_ratio": {
            name: round(ms[clock]["float32"] / ms[clock]["int8"], 3) for name, ms in times.items()
        },
    }
    print(f"{path.name}: {found}", flush=True)
    return found


def embeddings(model: tte_jax.Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, D] L2-normalised states of each row's last real token."""
    states = model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    z = states[np.arange(len(states)), last].astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def forward_ms(
    modules: dict[str, MultimodalLM], rows: int, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of the embedder's program, "wall" and "cpu" (all threads)."""
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 500, (rows, tokens)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens), (rows, 3, tokens))
    one_a_row = jnp.ones((rows, tokens), jnp.int32), jnp.full((rows, 1), tokens - 1)
    arguments = (ids, positions, *one_a_row, None, None)
    embed = {
        name: jax.jit(programs.embed).lower(module, *arguments).compile()
        for name, module in modules.items()
    }
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    taken = {clock: {name: list[float]() for name in modules} for clock in clocks}
    for _ in range(rounds + 2):
        for name, module in modules.items():
            began = {clock: now() for clock, now in clocks.items()}
            embed[name](module, *arguments).block_until_ready()
            for clock, now in clocks.items():
                taken[clock][name].append(1000 * (now() - began[clock]))
    return {
        clock: {name: round(statistics.median(ms[2:]), 3) for name, ms in each.items()}
        for clock, each in taken.items()
    }


def builtin_batches(path: Path, rows: int) -> dict[str, dict[str, np.ndarray]]:
    """Labels as queries and pictures as documents, of the built-in corpus."""
    prompts = PromptSet.from_dir(path)
    documents = list(islice(openmoji.documents(), rows))
    labels = (Content.of(str(d.metadata["name"])) for d in documents)
    return {
        "labels": padded(prompts.embed(EmbedItem(c, Side.QUERY, "")) for c in labels),
        "pictures": padded(
            prompts.embed(EmbedItem(d.content, Side.DOCUMENT, "")) for d in documents
        ),
    }


def padded(prompts: Iterable[Prompt]) -> dict[str, np.ndarray]:
    """Prompts of unequal lengths as one batch, padded on the right."""
    made = list(prompts)
    width = max(len(p.ids) for p in made)
    ids = np.zeros((len(made), width), np.int32)
    mask = np.zeros((len(made), width), np.int32)
    for row, prompt in enumerate(made):
        ids[row, : len(prompt.ids)], mask[row, : len(prompt.ids)] = prompt.ids, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if images := [image for prompt in made for image in prompt.images]:
        batch["pixel_values"] = np.concatenate([patches for patches, _ in images])
        batch["image_grid_thw"] = np.array([grid for _, grid in images])
    return batch


def random_batch(rows: int, tokens: int = 64) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, RANDOM["vocab_size"], (rows, tokens), np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def write_random(folder: Path) -> None:
    """A model directory of `RANDOM` with freshly initialised weights."""
    (folder / "config.json").write_text(json.dumps(RANDOM))
    hf.export(MultimodalLM(model_config(folder), rngs=nnx.Rngs(0)), folder)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
