"""What the options of an optimiser do."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from training.optimiser import Optimiser, adamw
from tte_jax.errors import InvalidInputError


def test_the_rate_falls_as_it_was_asked_to() -> None:
    weights = {"up_df": jnp.ones((1, 8, 8))}
    for kind in ("adamw", "muon"):
        last = {}
        for schedule in ("linear", "cosine"):
            tx = Optimiser(kind, lr=1.0, schedule=schedule, warmup=0.1).make(10)
            state, moved = tx.init(weights), []
            for step in range(10):
                grads = {"up_df": jnp.full((1, 8, 8), 1.0 + step)}
                updates, state = tx.update(grads, state, weights)
                moved.append(float(jnp.abs(updates["up_df"]).max()))
            last[schedule] = moved[-1] / max(moved)
        # At the ninth tenth a line is at a ninth of its height, a cosine at a hundredth or so.
        assert last["linear"] > 2 * last["cosine"] > 0, kind
    with pytest.raises(InvalidInputError, match="10 steps leave nothing after a warm-up of 10"):
        adamw(lr=1.0, warmup=10, steps=10, weight_decay=0.0)
