"""The one place that writes and reads training checkpoints (Orbax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx


def pure(tree: Any) -> Any:
    """Plain nested dicts of arrays: the layout on disk is ours, not a library class's."""
    return nnx.to_pure_dict(nnx.state(tree)) if isinstance(tree, nnx.Module) else tree


class Checkpoints:
    """The newest few states of a run, saved beside training."""

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Start writing `state` (arrays in dicts, lists and tuples) without waiting for it."""
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        self._manager.save(step, args=ocp.args.StandardSave(leaves))

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, in the structure, shapes and dtypes of `like`.

        Raises ValueError when the number of leaves or a shape differs.
        """
        leaves, tree = jax.tree.flatten(like)
        target = {str(i): leaf for i, leaf in enumerate(leaves)}
        found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return jax.tree.unflatten(tree, [found[str(i)] for i in range(len(leaves))])

    def close(self) -> None:
        """Wait for a write under way."""
        self._manager.wait_until_finished()
        self._manager.close()
