"""Loading a Hugging Face model directory and writing one back.

Strict in both directions: every tensor of the files is used or on the list of those that may be
ignored, every parameter is filled, every shape agrees; all problems are reported together.

A process reads the parts that its own devices hold, each part once, and turns them into our layout
while they are read. One parameter at a time is in host memory, the largest first, when the devices
(which on a CPU are the same memory) hold least.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from tte_jax.errors import InvalidInputError, PreconditionError, UnsupportedError
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.nn import linear
from tte_jax.weights.files import Stored, runs, tensors
from tte_jax.weights.table import Entry, entries, on_disk

# Buffers that old checkpoints carry and that are computed, not learned.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

QUANTISATIONS = ("int8",)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def load(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding_of: ShardingOf | None = None,
    quantise: str | None = None,
    change: Callable[[Entry, jax.Array], jax.Array] | None = None,
) -> MultimodalLM:
    """Read a model directory.

    Args:
      directory: holds `config.json` and `*.safetensors`, with or without an index file.
      dtype: dtype of the parameters in memory, whatever the files hold.
      sharding_of: sharding for a parameter path and shape; None = the default device.
      quantise: "int8" = the matrices of linear layers as `Int8Weight`; tables, norms and biases
        stay in `dtype`, which is also that of the activations. None = everything in `dtype`.
      change: what becomes of each parameter once it is read, such as merging an adapter.

    Raises:
      InvalidInputError: an unknown `quantise`.
      NotFoundError: directory, config or weights missing.
      PreconditionError: unsupported family, or tensors missing, left over or misshaped (all named).
      DataLossError: a weight file that cannot be read.
    """
    check_quantise(quantise)
    directory = Path(directory)
    config = model_config(directory)
    files = tensors(directory)
    table = entries(config)
    _check(directory, config, table, files)
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=None, dtype=dtype))
    graph, state = nnx.split(abstract)
    pure = nnx.to_pure_dict(state)
    targets = [(entry, *descend(pure, entry.path)) for entry in table]
    for entry, node, leaf in sorted(targets, key=lambda t: -prod(t[1][t[2]].shape)):
        shape = tuple(node[leaf].shape)
        sharding = sharding_of(entry.path, shape) if sharding_of else None
        value = _read(entry, shape, files, dtype, sharding)
        if change is not None:
            value = change(entry, value)
        if quantise:
            value = quantised(entry, value)
        # Waiting lets go of the host's copy before the next parameter is read.
        node[leaf] = jax.block_until_ready(value)
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


def quantised(entry: Entry, value: jax.Array) -> jax.Array | linear.Int8Weight:
    """A parameter as int8 where it is the matrix of a linear layer, else as it is."""
    if not entry.inputs:
        return value
    first = int(entry.stacked)
    return linear.quantise(value, tuple(range(first, first + entry.inputs)))


def check_quantise(quantise: str | None) -> None:
    """Raises InvalidInputError unless it is None or one of `QUANTISATIONS`."""
    if quantise not in (None, *QUANTISATIONS):
        raise InvalidInputError(
            f"quantise {quantise!r} is not known; expected {' or '.join(QUANTISATIONS)}, or None"
            " for the weights as they are.",
            field="quantise",
        )


def export(
    model: MultimodalLM,
    directory: str | Path,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write the weights as safetensors that transformers loads; each file atomically.

    Weight files of an earlier export there are removed. Configuration and tokenizer files are the
    caller's: copy those of the source model.

    Args:
      dtype: dtype in the files; None keeps each parameter's own.
      shard_bytes: largest size of one file's tensors; more of them make several files and an
        index. A tensor larger than that has a file of its own.

    Returns: the weight files.

    Raises:
      UnsupportedError: the weights are quantised.
    """
    directory = Path(directory)
    pure = nnx.to_pure_dict(nnx.state(model))
    shards: list[list[tuple[str, Entry, np.ndarray]]] = [[]]
    room, total = shard_bytes, 0
    family = model.config.model_type
    for entry in entries(model.config):
        node, leaf = descend(pure, entry.path)
        if isinstance(node[leaf], linear.Int8Weight):
            raise UnsupportedError(
                "int8 weights are not exported: what rounding took is gone. Load the model without"
                " quantise.",
                reason="QUANTISED_MODEL",
            )
        value = np.asarray(node[leaf])
        width = np.dtype(dtype or value.dtype).itemsize
        for layer, one in enumerate(value if entry.stacked else [value]):
            size = one.size * width
            if size > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append((on_disk(entry.name.format(l=layer), family), entry, one))
            room, total = room - size, total + size
    directory.mkdir(parents=True, exist_ok=True)
    stale = {*directory.glob("model-*-of-*.safetensors"), directory / WEIGHTS, directory / INDEX}
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Turned and converted here, so that one shard at a time is copied.
        tensors = {key: entry.to_hf(one.astype(dtype or one.dtype)) for key, entry, one in shard}
        written.append(_replace(directory / name, lambda path, t=tensors: _save(t, path)))
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        stale.discard(_replace(directory / INDEX, lambda path: path.write_text(text)))
    for path in stale.difference(written):
        path.unlink(missing_ok=True)
    return written


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    """The file is the old one or the whole new one, whatever happens meanwhile."""
    fd, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(fd)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _names(entry: Entry, config: ModelConfig) -> list[str]:
    if not entry.stacked:
        return [entry.name]
    vision = entry.path.startswith("visual.")
    layers = config.vision.depth if vision and config.vision else config.text.layers
    return [entry.name.format(l=i) for i in range(layers)]


def _check(
    directory: Path,
    config: ModelConfig,
    table: list[Entry],
    files: dict[str, Stored],
) -> None:
    expected = {name: e.hf_shape for e in table for name in _names(e, config)}
    problems = [f"missing: {n} {list(s)}" for n, s in expected.items() if n not in files]
    for name, stored in files.items():
        shape = stored.shape
        if name not in expected:
            tied_copy = name == "lm_head.weight" and config.text.tied
            if not tied_copy and not name.endswith(IGNORED_SUFFIXES):
                problems.append(f"unexpected: {name} {list(shape)}")
        elif shape != expected[name]:
            problems.append(f"shape: {name} is {list(shape)}, expected {list(expected[name])}")
    if problems:
        raise PreconditionError(
            f"The weights in {str(directory)!r} do not fit its config.json"
            f" ({len(problems)} problems):\n  " + "\n  ".join(sorted(problems)),
            reason="MODEL_WEIGHTS_MISMATCH",
            problems=len(problems),
        )


def descend(pure: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """(dict, key) at which the parameter of a dotted path stands."""
    *parents, leaf = path.split(".")
    for name in parents:
        pure = pure[name]
    return pure, leaf


def _read(
    entry: Entry,
    shape: tuple[int, ...],
    files: dict[str, Stored],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One parameter; of every layer only the slices that this process's devices hold."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def build(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in parts:  # devices that hold the same share one reading
            parts[bounds] = np.empty([stop - start for start, stop in bounds], dtype)
            fill(parts[bounds], index)
        return parts[bounds]

    def fill(part: np.ndarray, index: tuple[slice, ...]) -> None:
        if entry.stacked:
            layers = range(*index[0].indices(shape[0]))
            places = {entry.name.format(l=i): one for i, one in zip(layers, part, strict=True)}
            sides = entry.sides(shape[1:]), entry.sides(index[1:])
        else:
            places = {entry.name: part}
            sides = entry.sides(shape), entry.sides(index)
        rows, columns = map(runs, *sides)
        for name, place in places.items():
            files[name].read(rows, columns, into=entry.matrix(place))

    if sharding is None:  # not jnp.asarray, which compiles a program for every shape
        return jax.device_put(build((slice(None),) * len(shape)))
    return jax.make_array_from_callback(
        shape,
        sharding,
        build,  # pyright: ignore[reportArgumentType]  # parameters are sharded, their index is no None
    )
