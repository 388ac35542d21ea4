"""Fresh parameters, as all modules here draw them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

DEVIATION = 0.02


@dataclass(frozen=True)
class Initial:
    """Draws parameters of one module.

    Attributes:
      rngs: every matrix takes the next key of `params`, so the order of the calls counts. None =
        zeros, where only shapes are wanted: tracing the draws is a third of opening a small model.
      dtype: of the parameters.
      stack: leading dimensions of all of them: (L,) for stacked layers.
    """

    rngs: nnx.Rngs | None
    dtype: jnp.dtype
    stack: tuple[int, ...] = ()

    def normal(self, *shape: int, scale: float = DEVIATION) -> nnx.Param:
        if self.rngs is None:
            return self.zeros(*shape)
        drawn = jax.random.normal(self.rngs.params(), (*self.stack, *shape), self.dtype)
        return nnx.Param(scale * drawn)

    def residual(self, *shape: int) -> nnx.Param:
        """Writes to the residual stream start smaller, by depth (GPT-2's scheme)."""
        (layers,) = self.stack
        return self.normal(*shape, scale=DEVIATION / (2 * layers) ** 0.5)

    def zeros(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.zeros((*self.stack, *shape), self.dtype))

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones((*self.stack, *shape), self.dtype))
