"""The one place that writes and reads training checkpoints (Orbax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

from tte_jax.errors import DataLossError, PreconditionError


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


FORMAT = 1


class RunCheckpoints:
    """Checkpoints of a whole run: arrays, and what else decides how it goes on.

    Arrays (parameters and optimiser) are saved in plain dicts by path, written beside training, and
    read straight to the sharding that is asked for, whatever mesh wrote them. `position` is JSON:
    the step, the place in the data, the mined round and the offset in it, and what must be the same
    for the run to go on. The newest `last` and the `best` by a metric are kept.

    Args:
      metric: name in `save`'s metrics that "best" means; "" = only the newest are kept.
      lower: whether a low value is good.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        last: int = 2,
        best: int = 1,
        metric: str = "",
        lower: bool = False,
    ) -> None:
        policies: list[Any] = [keeping.LatestN(last)]
        if metric and best:
            policies.append(
                keeping.BestN(
                    # One without the metric is worse than any that has it.
                    get_metric_fn=lambda m: (m or {}).get(
                        metric, float("inf" if lower else "-inf")
                    ),
                    reverse=lower,
                    n=best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best = (metric, lower) if metric else None
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                create=True,
                preservation_policy=keeping.AnyPreservationPolicy(policies),
                best_fn=(lambda m: m[metric]) if metric else None,
                best_mode="min" if lower else "max",
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of the best one by the metric; None before any had it."""
        if self._best is None:
            return None
        metric, lower = self._best
        found = {}
        for step in self.steps():
            try:
                value = (self._manager.metrics(step) or {}).get(metric)
            except FileNotFoundError:
                value = None
            if value is not None:
                found[step] = -value if lower else value
        return max(found, key=lambda s: (found[s], s), default=None)

    def save(
        self, step: int, arrays: Any, position: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Start writing, without waiting; the arrays may be donated once this returns."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_named(arrays)),
                position=ocp.args.JsonSave({"format": FORMAT, **position}),
            ),
            metrics=metrics,
            force=True,
        )

    def position(self, step: int) -> dict[str, Any]:
        """What `save` was given.

        Raises:
          PreconditionError: written by a later version.
          DataLossError: it cannot be read.
        """
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
            )["position"]
            version = found.pop("format")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataLossError(
                f"The checkpoint of step {step} in {self._manager.directory} cannot be read ({e})."
                " Remove its folder to go on from the one before.",
                reason="CHECKPOINT_DAMAGED",
            ) from e
        if version != FORMAT:
            raise PreconditionError(
                f"The checkpoint of step {step} in {self._manager.directory} has format {version};"
                f" this version reads {FORMAT}.",
                reason="CHECKPOINT_FORMAT",
            )
        return found

    def restore(self, step: int, like: Any) -> Any:
        """The arrays in the structure, dtypes and shardings of `like`, ready to be donated.

        Raises:
          PreconditionError: names or shapes differ from those saved: another model or method.
        """
        target = _named(like)
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
            )["arrays"]
        except ValueError as e:
            raise PreconditionError(
                f"The checkpoint of step {step} in {self._manager.directory} is of another model or"
                f" method of training: {e}. Give another `out`, or the settings of that run.",
                reason="CHECKPOINT_MISMATCH",
            ) from e
        names = jax.tree.structure(like)
        leaves = [found[name] for name in _named(like)]
        # Restored arrays are not always donatable as they come; what a program returns is.
        where = jax.tree.map(lambda x: x.sharding, leaves)
        leaves = jax.jit(lambda x: jax.tree.map(lambda y: y + 0, x), out_shardings=where)(leaves)
        return jax.tree.unflatten(names, leaves)

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for a write under way."""
        self.wait()
        self._manager.close()


def go_on(mine: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    """Raises PreconditionError when a checkpoint belongs to another order of the data.

    Args:
      mine: what must be the same; found: the checkpoint's `position`; out: the run's folder.
    """
    if other := [f"{k} {found.get(k)} (now {v})" for k, v in mine.items() if found.get(k) != v]:
        raise PreconditionError(
            f"{out} holds a run with {', '.join(other)}: going on would skip or repeat examples."
            " Use its settings, or another --out.",
            reason="RUN_MISMATCH",
        )


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
