"""Loading a Hugging Face model directory and writing one back.

Strict in both directions: every tensor of the files is used or on the list of those that may be
ignored, every parameter is filled, every shape agrees; all problems are reported together. Tensors
are read slice by slice, straight to the sharding of the parameter.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy before safetensors reads it)
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tte_jax.errors import DataLossError, NotFoundError, PreconditionError
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.weights.table import Entry, entries, normalise, on_disk

# Buffers that old checkpoints carry and that are computed, not learned.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def load(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding_of: ShardingOf | None = None,
    change: Callable[[Entry, jax.Array], jax.Array] | None = None,
) -> MultimodalLM:
    """Read a model directory.

    Args:
      directory: holds `config.json` and `*.safetensors`, with or without an index file.
      dtype: dtype of the parameters in memory, whatever the files hold.
      sharding_of: sharding for a parameter path and shape; None = the default device.
      change: what becomes of each parameter once it is read, such as merging an adapter.

    Raises:
      NotFoundError: directory, config or weights missing.
      PreconditionError: unsupported family, or tensors missing, left over or misshaped (all named).
      DataLossError: a weight file that cannot be read.
    """
    directory = Path(directory)
    config = model_config(directory)
    files = _tensor_files(directory)
    table = entries(config)
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    pure = nnx.to_pure_dict(state)
    handles: dict[Path, Any] = {}
    try:
        for path in {p for p, _ in files.values()}:
            handles[path] = safe_open(path, "np").__enter__()
        _check(directory, config, table, files, handles)
        for entry in table:
            node, leaf = _descend(pure, entry.path)
            node[leaf] = _read(entry, node[leaf], files, handles, dtype, sharding_of)
            if change is not None:
                node[leaf] = change(entry, node[leaf])
    except SafetensorError as e:
        raise DataLossError(
            f"A weight file in {str(directory)!r} is damaged ({e}). Download the model again.",
            reason="MODEL_WEIGHTS_DAMAGED",
        ) from e
    finally:
        for handle in handles.values():
            handle.__exit__(None, None, None)
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


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
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pure = nnx.to_pure_dict(nnx.state(model))
    shards: list[list[tuple[str, Entry, np.ndarray]]] = [[]]
    room, total = shard_bytes, 0
    family = model.config.model_type
    for entry in entries(model.config):
        node, leaf = _descend(pure, entry.path)
        value = np.asarray(node[leaf])
        width = np.dtype(dtype or value.dtype).itemsize
        for layer, one in enumerate(value if entry.stacked else [value]):
            size = one.size * width
            if size > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append((on_disk(entry.name.format(l=layer), family), entry, one))
            room, total = room - size, total + size
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


def _tensor_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Table name → (file, name in that file)."""
    index = directory / INDEX
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        absent = sorted({f for f in weight_map.values() if not (directory / f).is_file()})
        if absent:
            raise NotFoundError(
                f"{str(index)!r} names files that are not there: {', '.join(absent)}."
                " Download the model again.",
                reason="MODEL_WEIGHTS_NOT_FOUND",
            )
        return {normalise(k): (directory / f, k) for k, f in weight_map.items()}
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise NotFoundError(
            f"No *.safetensors in {str(directory)!r}. Weights in other formats must be converted"
            " to safetensors first.",
            reason="MODEL_WEIGHTS_NOT_FOUND",
        )
    found: dict[str, tuple[Path, str]] = {}
    for path in shards:
        try:
            with safe_open(path, "np") as handle:
                found.update({normalise(k): (path, k) for k in handle.keys()})  # noqa: SIM118
        except SafetensorError as e:
            raise DataLossError(
                f"{str(path)!r} is not a readable safetensors file ({e}). Download it again.",
                reason="MODEL_WEIGHTS_DAMAGED",
            ) from e
    return found


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
    files: dict[str, tuple[Path, str]],
    handles: dict[Path, Any],
) -> None:
    expected = {name: e.hf_shape for e in table for name in _names(e, config)}
    problems = [f"missing: {n} {list(s)}" for n, s in expected.items() if n not in files]
    for name, (path, key) in files.items():
        shape = tuple(handles[path].get_slice(key).get_shape())
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
    target: Any,
    files: dict[str, tuple[Path, str]],
    handles: dict[Path, Any],
    dtype: Any,
    sharding_of: ShardingOf | None,
) -> jax.Array:
    """One parameter, read layer by layer."""
    shape = tuple(target.shape)

    def tensor(name: str, inner: tuple[int, ...]) -> np.ndarray:
        path, key = files[name]
        return entry.to_jax(handles[path].get_tensor(key), inner).astype(dtype)

    def build(index: tuple[slice, ...]) -> np.ndarray:
        if not entry.stacked:
            return tensor(entry.name, shape)[index]
        layers = range(*index[0].indices(shape[0]))
        return np.stack([tensor(entry.name.format(l=i), shape[1:])[index[1:]] for i in layers])

    sharding = sharding_of(entry.path, shape) if sharding_of else None
    if sharding is None:
        return jnp.asarray(build((slice(None),) * len(shape)))
    return jax.make_array_from_callback(
        shape,
        sharding,
        build,  # pyright: ignore[reportArgumentType]  # parameters are sharded, their index is no None
    )
