"""Loading a Hugging Face model directory and writing one back.

Strict in both directions: every tensor of the files is used or on the list of those that may be
ignored, every parameter is filled, every shape agrees; all problems are reported together.

A process reads the parts that its own devices hold, each part once, and turns them into our layout
while they are read. One parameter at a time is in host memory, the largest first, when the devices
(which on a CPU are the same memory) hold least.
"""

from __future__ import annotations

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

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def load(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding_of: ShardingOf | None = None,
    quantise: str | None = None,
) -> MultimodalLM:
    """Read a model directory.

    Args:
      directory: holds `config.json` and `*.safetensors`, with or without an index file.
      dtype: dtype of the parameters in memory, whatever the files hold.
      sharding_of: sharding for a parameter path and shape; None = the default device.
      quantise: "int8" = the matrices of linear layers as `Int8Weight`; tables, norms and biases
        stay in `dtype`, which is also that of the activations. None = everything in `dtype`.

    Raises:
      InvalidInputError: an unknown `quantise`.
      NotFoundError: directory, config or weights missing.
      PreconditionError: unsupported family, or tensors missing, left over or misshaped (all named).
      DataLossError: a weight file that cannot be read.
    """
    if quantise not in (None, "int8"):
        raise InvalidInputError(
            f"quantise {quantise!r} is not known; expected 'int8', or None for the weights as they"
            " are.",
            field="quantise",
        )
    directory = Path(directory)
    config = model_config(directory)
    files = tensors(directory)
    table = entries(config)
    _check(directory, config, table, files)
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    pure = nnx.to_pure_dict(state)
    targets = [(entry, *_descend(pure, entry.path)) for entry in table]
    for entry, node, leaf in sorted(targets, key=lambda t: -prod(t[1][t[2]].shape)):
        shape = tuple(node[leaf].shape)
        sharding = sharding_of(entry.path, shape) if sharding_of else None
        value = _read(entry, shape, files, dtype, sharding)
        if quantise and entry.inputs:
            first = int(entry.stacked)
            value = linear.quantise(value, tuple(range(first, first + entry.inputs)))
        # Waiting lets go of the host's copy before the next parameter is read.
        node[leaf] = jax.block_until_ready(value)
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


def export(
    model: MultimodalLM,
    directory: str | Path,
    *,
    dtype: Any = None,
    file_name: str = "model.safetensors",
) -> Path:
    """Write the weights as one safetensors file that transformers loads; atomic.

    Configuration and tokenizer files are the caller's: copy those of the source model.

    Args:
      dtype: dtype in the file; None keeps each parameter's own.

    Raises:
      UnsupportedError: the weights are quantised.
    """
    directory = Path(directory)
    pure = nnx.to_pure_dict(nnx.state(model))
    tensors: dict[str, np.ndarray] = {}
    family = model.config.model_type
    for entry in entries(model.config):
        node, leaf = _descend(pure, entry.path)
        if isinstance(node[leaf], linear.Int8Weight):
            raise UnsupportedError(
                "int8 weights are not exported: what rounding took is gone. Load the model without"
                " quantise.",
                reason="QUANTISED_MODEL",
            )
        value = np.asarray(node[leaf])
        if dtype is not None:
            value = value.astype(dtype)
        if entry.stacked:
            for layer, one in enumerate(value):
                tensors[on_disk(entry.name.format(l=layer), family)] = entry.to_hf(one)
        else:
            tensors[on_disk(entry.name, family)] = entry.to_hf(value)
    directory.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
    os.close(fd)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / file_name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return directory / file_name


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


def _descend(pure: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
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

    if sharding is None:
        return jnp.asarray(build((slice(None),) * len(shape)))
    return jax.make_array_from_callback(
        shape,
        sharding,
        build,  # pyright: ignore[reportArgumentType]  # parameters are sharded, their index is no None
    )
