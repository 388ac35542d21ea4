"""What comes out of a run: figures of its steps, retrieval on held-out examples, and the export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from training import parameters
from training.batches import Fill
from training.flops import Costs
from training.parameters import Split, Tuning
from tte_jax.weights import adapter as adapters
from tte_jax.weights import convert


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every metric over some steps."""
    return {name: float(np.mean([np.asarray(row[name]) for row in rows])) for name in rows[0]}


def speed(
    fills: Sequence[Fill],
    costs: Costs,
    *,
    seconds: float,
    examples: int,
    share: float,
    tuning: Tuning,
    peak: float,
    predicted: int = 0,
) -> dict[str, float]:
    """Examples a second, how much of the sub-batches was padding, and MFU where it can be known.

    Args:
      fills: of this process's share; share: how much of the job that is.
      predicted: tokens of this process with a next-token loss.
      peak: FLOP/s of the job; 0 = unknown.
    """
    both = Fill(*(sum(getattr(f, one.name) for f in fills) for one in fields(Fill)))
    found = {
        "examples_per_second": examples / seconds,
        "seconds_per_step": seconds / len(fills),
        "pad_share": both.pad_share,
    }
    work = costs.training(
        tokens=both.tokens,
        squares=both.squares,
        patches=both.patches,
        patch_squares=both.patch_squares,
        predicted=predicted,
        full=tuning.method == "full",
        tower=tuning.method == "full" and tuning.vision,
    )
    found["tflops"] = work / share / seconds / 1e12
    return found | ({"mfu": work / share / seconds / peak} if peak else {})


def retrieval(queries: np.ndarray, documents: np.ndarray, keys: Sequence[str]) -> dict[str, float]:
    """Rank of each query's document in the pool of all; equal keys are one document.

    A document that scores the same, or no number, counts as better than the right one: vectors
    that have all become one find nothing.

    Args:
      queries, documents: [N D], of each pair; need not be normalised.
    """
    order = {key: i for i, key in reversed(list(enumerate(keys)))}
    right = np.array([order[key] for key in keys])
    pool = np.unique(right)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    scores = unit(queries) @ unit(documents)[pool].T
    mine = scores[np.arange(len(right)), np.searchsorted(pool, right)]
    rank = (~(scores < mine[:, None])).sum(1) - 1  # one of them is the right one
    return {
        "hit1": float((rank < 1).mean()),
        "hit10": float((rank < 10).mean()),
        "mrr": float((1 / (1 + rank)).mean()),
    }


def whole(x: Any, mesh: Any) -> np.ndarray:
    """An array on the host, whatever processes hold it; every process must call it."""
    if mesh is None or jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda y: jax.sharding.reshard(y, PartitionSpec()))(x))


def gathered(
    parts: Split, trained: parameters.Tree, frozen: parameters.Tree, mesh: Any
) -> parameters.Tree:
    """What `export` writes, on every process's host: the adapters, or all parameters."""
    trained = jax.tree.map(lambda x: whole(x, mesh), trained)
    if parts.tuning.method != "full":
        return trained
    return {**{path: whole(x, mesh) for path, x in frozen.items()}, **trained}


def export(parts: Split, values: parameters.Tree, base: Path, out: Path) -> Path:
    """`out/export`, a directory that the servers read; adapters also as PEFT's `out/adapter`.

    Process 0 writes, with its own devices alone; call it outside any mesh.

    Args:
      values: of `gathered`.
      base: directory of the model that was trained from.
    """
    target = out / "export"
    if jax.process_index() == 0:
        with jax.default_device(jax.local_devices()[0]):
            if parts.tuning.method == "full":
                model = nnx.merge(parts.graph, nnx.State(parameters.nested(values)))
                convert.export_like(model, base, target)
            else:
                adapter = parameters.to_peft(parts, values, base=str(base))
                adapters.save(adapter, out / "adapter")
                convert.convert(base, target, to="hf", adapter=out / "adapter", force=True)
        _name(target, out.name)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("exported")
    return target


def _name(directory: Path, run: str) -> None:
    """`tte.json` says which run the weights are from; its other entries are the base's."""
    file = directory / "tte.json"
    spec: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"format": 1}
    spec["version"] = f"{spec.get('version', '')}+{run}".strip("+")
    file.write_text(json.dumps(spec, indent=2) + "\n")
