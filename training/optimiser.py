"""The optimisers of the training stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from tte_jax.errors import InvalidInputError

# Norm weights, biases and the temperature are smaller than this and are not decayed.
_MATRIX = 4096

# Which axes of a stacked weight are its inputs and outputs; the others (layers; query, key and
# value) are separate matrices. The vision merger's wide square matrix is left to Adam: it alone
# would cost as much as all others together.
_MATRICES = {
    "qkv_e3nh": MuonDimensionNumbers(1, (3, 4)),
    "o_nhe": MuonDimensionNumbers((1, 2), 3),
    "fc1_ef": MuonDimensionNumbers(1, 2),
    "fc2_fe": MuonDimensionNumbers(1, 2),
    "merge2_gd": MuonDimensionNumbers(0, 1),
    "q_dnh": MuonDimensionNumbers(1, (2, 3)),
    "k_dkh": MuonDimensionNumbers(1, (2, 3)),
    "v_dkh": MuonDimensionNumbers(1, (2, 3)),
    "o_nhd": MuonDimensionNumbers((1, 2), 3),
    "gate_df": MuonDimensionNumbers(1, 2),
    "up_df": MuonDimensionNumbers(1, 2),
    "down_fd": MuonDimensionNumbers(1, 2),
}


def _decayed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.size > _MATRIX, tree)


Falls = Literal["linear", "cosine"]


def _schedule(lr: float, warmup: int, steps: int, falls: Falls) -> optax.Schedule:
    """Rises in a line, then falls: in a line to 0, or in a cosine to a hundredth of `lr`."""
    if steps <= warmup:
        raise InvalidInputError(
            f"{steps} steps leave nothing after a warm-up of {warmup}; raise steps, or lower the"
            " warm-up",
            field="steps",
        )
    if falls == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, lr / 100)
    rise = optax.linear_schedule(0.0, lr, warmup)
    return optax.join_schedules([rise, optax.linear_schedule(lr, 0.0, steps - warmup)], [warmup])


def adamw(
    *, lr: float, warmup: int, steps: int, weight_decay: float, schedule: Falls = "cosine"
) -> optax.GradientTransformation:
    """AdamW behind a clip at norm 1; linear warm-up, then as `schedule` says.

    Raises:
      InvalidInputError: `steps` is not larger than `warmup`.
    """
    rate = _schedule(lr, warmup, steps, schedule)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=weight_decay, mask=_decayed),
    )


def muon(
    *, lr: float, warmup: int, steps: int, weight_decay: float, schedule: Falls = "cosine"
) -> optax.GradientTransformation:
    """Muon for the matrices inside the transformer blocks, Adam for everything else.

    Updates are scaled to the size that AdamW's have (arXiv 2502.16982), so one `lr` serves both.
    Clip and schedule as in `adamw`, which also raises the same error.
    """

    def matrices(params: Any) -> Any:
        def spec(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
            keys = (str(getattr(k, "key", getattr(k, "name", ""))) for k in path)
            names = {key.rsplit(".", 1)[-1] for key in keys}  # a tree, or a dict by dotted path
            found = [v for k, v in _MATRICES.items() if k in names]
            return found[0] if found else None

        return jax.tree_util.tree_map_with_path(spec, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            _schedule(lr, warmup, steps, schedule),
            consistent_rms=0.2,
            weight_decay=weight_decay,
            weight_decay_mask=_decayed,
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrices,
        ),
    )


@dataclass(frozen=True)
class Optimiser:
    """What turns gradients into updates.

    Attributes:
      kind: Muon is for full fine-tuning of small models; adapters take AdamW.
      lr: the highest rate; schedule: how it falls to its end ("linear" to 0, "cosine" to lr / 100).
      warmup: share of all steps in which it rises.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-4
    schedule: Falls = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0

    def make(self, steps: int) -> optax.GradientTransformation:
        """For a run of `steps` steps, behind a clip at norm 1."""
        warmup = min(max(1, round(self.warmup * steps)), steps - 1) if steps > 1 else 0
        return (muon if self.kind == "muon" else adamw)(
            lr=self.lr,
            warmup=warmup,
            steps=steps,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )
