"""A model's parameters as an Orbax checkpoint.

    DIR/config.json, tokenizer …   as in the Hugging Face directory it was made from
    DIR/tte_checkpoint.json        {"format": 1, "dtype": …}
    DIR/params/                    Orbax; plain dicts of arrays by our parameter paths

Orbax reads the part that each device holds, whatever mesh wrote it. Training keeps its own
checkpoints (`training.checkpoint`), which hold optimiser and data position too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from tte_jax.errors import DataLossError, PreconditionError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.weights import hf
from tte_jax.weights.hf import ShardingOf
from tte_jax.weights.table import entries

FORMAT = 1
MARKER, PARAMS = "tte_checkpoint.json", "params"


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a checkpoint of this module."""
    return (Path(directory) / MARKER).is_file()


def save(model: MultimodalLM, directory: str | Path, *, dtype: str) -> Path:
    """Write the parameters; configuration and tokenizer files are the caller's.

    Args:
      directory: without `params` in it yet.
      dtype: of all parameters; noted for the way back.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / PARAMS, nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
    marker = {"format": FORMAT, "dtype": dtype}
    (directory / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    return directory


def stored_dtype(directory: str | Path) -> str:
    """The dtype that `save` was told.

    Raises:
      PreconditionError: a format of a later version.
      DataLossError: a marker that cannot be read.
    """
    path = Path(directory) / MARKER
    try:
        marker = json.loads(path.read_text())
        version, dtype = marker["format"], marker["dtype"]
    except (ValueError, KeyError, TypeError) as e:
        raise DataLossError(f"{str(path)!r} is damaged ({e!r}). Convert the model again.") from e
    if version != FORMAT:
        raise PreconditionError(
            f"{str(path)!r} has format {version!r}; this version of tte reads {FORMAT}.",
            reason="CHECKPOINT_FORMAT",
        )
    return str(dtype)


def load(
    directory: str | Path,
    *,
    dtype: Any = None,
    sharding_of: ShardingOf | None = None,
    quantise: str | None = None,
) -> MultimodalLM:
    """Read a checkpoint; strict both ways, all problems reported together.

    Args:
      dtype: dtype of the parameters in memory; None = the stored one.
      sharding_of: sharding for a parameter path and shape; None = the default device.
      quantise: as for `hf.load`, but made when all is read: Orbax reads a tree at once, so the
        whole model is in memory once in `dtype`.

    Raises:
      InvalidInputError: an unknown `quantise`.
      NotFoundError, PreconditionError: no `config.json`, or an unknown family or format; parameters
        missing, left over or misshaped.
      DataLossError: files that cannot be read.
    """
    hf.check_quantise(quantise)
    directory = Path(directory).absolute()
    stored = stored_dtype(directory)
    config = model_config(directory)
    wanted = jax.numpy.dtype(dtype or stored)
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=wanted))
    graph, state = nnx.split(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        placed = sharding_of(_name(path), leaf.shape) if sharding_of else None
        return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=placed or here)

    targets = jax.tree_util.tree_map_with_path(target, nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(directory / PARAMS).item_metadata
            _check(directory, _shapes(targets), _shapes(found.tree))
            pure = checkpointer.restore(directory / PARAMS, targets)
        except (OSError, ValueError, AttributeError) as e:
            raise DataLossError(
                f"The checkpoint in {str(directory)!r} cannot be read ({type(e).__name__}: {e})."
                " Convert the model again.",
                reason="MODEL_WEIGHTS_DAMAGED",
            ) from e
    if quantise:
        for entry in entries(config):
            node, leaf = hf.descend(pure, entry.path)
            # Each float matrix goes before the next one is rounded.
            node[leaf] = jax.block_until_ready(hf.quantised(entry, node[leaf]))
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _check(
    directory: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    problems = [f"missing: {n} {list(s)}" for n, s in expected.items() if n not in found]
    problems += [f"unexpected: {n} {list(s)}" for n, s in found.items() if n not in expected]
    problems += [
        f"shape: {n} is {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if found.get(n, s) != s
    ]
    if problems:
        raise PreconditionError(
            f"The checkpoint in {str(directory)!r} does not fit its config.json"
            f" ({len(problems)} problems):\n  " + "\n  ".join(sorted(problems)),
            reason="MODEL_WEIGHTS_MISMATCH",
            problems=len(problems),
        )
