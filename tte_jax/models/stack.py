"""Stacked layers, run one after the other.

Weights of all layers lie behind a leading L, and a scan runs over it: a dozen leaves whatever the
depth, and one layer to compile. XLA's CPU backend copies each layer's weights out of the stack
before it uses them. For one token that is most of the work: 24 matrices of 768 x 3072 are read at 4
to 5 GB/s out of a stack, at 14 to 18 GB/s as arrays of their own (two cores). So layers can also
stand `apart`: the same memory, seen as one array for each weight of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tte_jax.nn.linear import TurnedWeight

C = TypeVar("C")

Weights = dict[str, Any]
"""By name; of all layers behind a leading L, or of one."""


class PerLayer(tuple[jax.Array, ...]):
    """What would be an array with a leading L, as one array for each layer; only inside a trace."""


class Stack(nnx.Module):
    """Base of stacked layers: every parameter has a leading L.

    Attributes:
      matrices: over how many dimensions, the first ones after L, a product with each matrix sums.
    """

    matrices: ClassVar[dict[str, int]] = {}

    def weights(self) -> Weights | list[Weights]:
        """What `run_layers` takes."""
        return _parameters(self)


class Apart(Stack):
    """The layers of a stack, each with arrays of its own, which share the stack's memory where they
    are aligned (64 bytes); for one CPU device. Not for training: no gradient goes to the stack.

    Args:
      turned: matrices become a `TurnedWeight` each, which is a copy; int8 ones stay as they are.
    """

    def __init__(self, stack: Stack, *, turned: bool = False) -> None:
        whole = stack.weights()
        assert isinstance(whole, dict), "apart already"
        host = {name: jax.tree.map(np.asarray, value) for name, value in whole.items()}
        count = len(jax.tree.leaves(host)[0])

        def of_layer(name: str, value: Any, i: int) -> Any:
            if turned and name in stack.matrices and isinstance(value, np.ndarray):
                return turned_matrix(value[i], inputs=stack.matrices[name])
            return jax.tree.map(_at(i), value)

        self.layers = nnx.List(
            _Layer({name: of_layer(name, value, i) for name, value in host.items()})
            for i in range(count)
        )

    def weights(self) -> list[Weights]:
        return [one.weights() for one in self.layers]


class _Layer(nnx.Module):
    def __init__(self, weights: Weights) -> None:
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))

    def weights(self) -> Weights:
        return _parameters(self)


def _parameters(module: nnx.Module) -> Weights:
    return {k: v[...] for k, v in vars(module).items() if isinstance(v, nnx.Param)}


def _at(layer: int) -> Callable[[np.ndarray], jax.Array]:
    return lambda whole: jax.device_put(whole[layer], may_alias=True)


def turned_matrix(matrix: Any, *, inputs: int) -> TurnedWeight:
    """A copy of a matrix [inputs..., outputs...] with its outputs first.

    Args:
      inputs: how many dimensions its product sums over.
    """
    order = (*range(inputs, matrix.ndim), *range(inputs))
    return TurnedWeight(jnp.asarray(np.ascontiguousarray(np.asarray(matrix).transpose(order))))


def part(weights: Weights | list[Weights], begin: int, end: int) -> Weights | list[Weights]:
    """Layers `begin` to `end`."""
    if isinstance(weights, list):
        return weights[begin:end]
    return jax.tree.map(lambda w: w[begin:end], weights)


def one_of(weights: Weights | list[Weights], index: int) -> Weights:
    """A single layer's weights."""
    if isinstance(weights, list):
        return weights[index]
    return jax.tree.map(lambda w: w[index], weights)


def run_layers(
    layer: Callable[[C, tuple[Weights, Any]], tuple[C, Any]],
    carry: C,
    weights: Weights | list[Weights],
    more: Any = None,
    *,
    count: int | None = None,
    unroll: bool = False,
) -> tuple[C, Any]:
    """`jax.lax.scan` over layers, or a loop over layers that stand apart.

    Args:
      layer: (carry, (its weights, its part of `more`)) → (carry, output).
      more: pytree of arrays with a leading L, such as caches; for layers apart also of `PerLayer`.
      count: run the first so many layers only; None = all.
      unroll: of the scan; compiles every layer by itself.

    Returns:
      The last carry, and the outputs behind a leading L.
    """
    if isinstance(weights, dict):
        if count is None:
            return jax.lax.scan(layer, carry, (weights, more), unroll=unroll)

        # Read by number: a stack that was cut before the scan would be copied for every call.
        def numbered(carry: C, i: jax.Array) -> tuple[C, Any]:
            mine = jax.tree.map(
                lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), (weights, more)
            )
            return layer(carry, mine)

        return jax.lax.scan(numbered, carry, jnp.arange(count), unroll=unroll)
    weights = weights[:count]
    outputs = []
    for i, one in enumerate(weights):
        mine = jax.tree.map(lambda x, i=i: x[i], more)
        carry, output = layer(carry, (one, mine))
        outputs.append(output)
    return carry, jax.tree.map(lambda *all: jnp.stack(all), *outputs)
