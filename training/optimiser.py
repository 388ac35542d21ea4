"""The optimiser that all stages share."""

from __future__ import annotations

import jax
import optax

# Norm weights, biases and the temperature are smaller than this and are not decayed.
_MATRIX = 4096


def adamw(
    *, lr: float, warmup: int, steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW behind a clip at norm 1; linear warm-up, then a cosine to a hundredth of `lr`.

    Raises:
      ValueError: `steps` is not larger than `warmup`.
    """
    if steps <= warmup:
        raise ValueError(f"{steps} steps leave nothing after a warm-up of {warmup}; raise steps")
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, lr / 100)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=weight_decay,
            mask=lambda tree: jax.tree.map(lambda x: x.size > _MATRIX, tree),
        ),
    )
