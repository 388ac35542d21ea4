"""Meshes, and the rules that place parameters and batches on them.

A mesh has three axes, always all of them, of explicit type: the sharding of every value is part of
its type, and an operation whose result would have to be guessed is an error while tracing.

    data    copies of the model; splits the batch
    fsdp    splits the batch, and the storage of every matrix (gathered for use, layer by layer)
    tp      splits heads, inner sizes of MLPs and the vocabulary, and with them the computation

The rules go by the dimension letters in which every parameter's name ends (`tte_jax/glossary.md`),
so a new family needs none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.nn.linear import TENSOR_AXIS

AXES = ("data", "fsdp", TENSOR_AXIS)
AnyMesh = Mesh | AbstractMesh


@dataclass(frozen=True)
class Rules:
    """Dimension letter → mesh axes that may split it, in order of preference.

    Letters are served from the right; each takes the first of its axes that no other dimension of
    the parameter has taken. So `merge1_gg` is split over tp at its output and fsdp at its input.
    A dimension that its axis does not divide stays whole on that axis and is reported
    (`Placement.whole`): with 2 key/value heads on tp=4 the keys are computed on all four, while
    the query heads stay split. Vectors are split over tp alone (biases, with their matrix) and
    those of norms not at all: gathering them would cost more than their kilobytes.
    """

    V: tuple[str, ...] = (TENSOR_AXIS,)
    D: tuple[str, ...] = ("fsdp",)
    E: tuple[str, ...] = ("fsdp",)
    N: tuple[str, ...] = (TENSOR_AXIS,)
    K: tuple[str, ...] = (TENSOR_AXIS,)
    F: tuple[str, ...] = (TENSOR_AXIS,)
    G: tuple[str, ...] = (TENSOR_AXIS, "fsdp")
    H: tuple[str, ...] = ()
    C: tuple[str, ...] = ()
    P: tuple[str, ...] = ()
    S: tuple[str, ...] = ()
    L: tuple[str, ...] = ()
    B: tuple[str, ...] = ("data", "fsdp")

    def of_letter(self, letter: str) -> tuple[str, ...] | None:
        """The axes of a letter, either case; a digit has none; None = no such letter."""
        if letter.isdigit():
            return ()
        known = {f.name for f in fields(self)}
        return getattr(self, letter.upper()) if letter.upper() in known else None


@dataclass(frozen=True)
class Placement:
    """Where a parameter goes.

    Attributes:
      spec: mesh axis of each dimension.
      whole: what a rule would have split but could not, such as "K=2 over tp=4".
    """

    spec: PartitionSpec
    whole: tuple[str, ...]


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis of "data=1,fsdp=4,tp=2"; an axis that is not named has size 1.

    Raises:
      InvalidInputError: an unknown or repeated axis, or a size that is no positive number.
    """
    sizes: dict[str, int] = {axis: 1 for axis in AXES}
    seen: set[str] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in seen or not size.isdigit() or int(size) < 1:
            raise InvalidInputError(
                f"{part!r} in the mesh {text!r} is not understood; expected each of"
                f" {', '.join(AXES)} at most once, with a positive size: data=1,fsdp=4,tp=2.",
                field="mesh",
            )
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices of the job, or over `devices` in their order.

    Without `devices`, JAX chooses the order: on a TPU by its torus, where the devices of a process
    need not stand together.

    Raises:
      InvalidInputError: the sizes' product is not the number of devices.
    """
    have = len(jax.devices()) if devices is None else len(devices)
    shape = (data, fsdp, tp)
    if prod(shape) != have:
        named = " x ".join(f"{n}={s}" for n, s in zip(AXES, shape, strict=True))
        raise InvalidInputError(
            f"The mesh {named} needs {prod(shape)} devices, but there are {have}.", field="mesh"
        )
    types = (AxisType.Explicit,) * 3
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=types)
    return Mesh(np.array(devices, object).reshape(shape), AXES, axis_types=types)


def abstract_mesh(*, data: int = 1, fsdp: int = 1, tp: int = 1) -> AbstractMesh:
    """The same without devices, for planning."""
    return AbstractMesh((data, fsdp, tp), AXES, axis_types=(AxisType.Explicit,) * 3)


def placement(path: str, shape: tuple[int, ...], mesh: AnyMesh, rules: Rules) -> Placement:
    """Where the parameter at a dotted `path`, such as `text.layers.q_dnh`, goes.

    A leading dimension that the name does not mention is the stack of layers, never split.

    Raises:
      InternalError: the name does not end in letters of the glossary, one a dimension.
    """
    name = path.rsplit(".", 1)[-1]
    letters = name.rsplit("_", 1)[-1]
    allowed = {letter: rules.of_letter(letter) for letter in letters}
    stacked = len(shape) - len(letters)
    unknown = sorted(letter for letter, axes in allowed.items() if axes is None)
    if unknown or stacked not in (0, 1):
        raise InternalError(
            f"Parameter {path!r} of shape {shape} has no sharding rule: its name must end in one"
            " letter of tte_jax/glossary.md per dimension (a leading L may be left out)"
            + (f"; not known: {', '.join(unknown)}." if unknown else "."),
            reason="NO_SHARDING_RULE",
        )
    axes: list[str | None] = [None] * len(shape)
    whole: list[str] = []
    for place in reversed(range(stacked, len(shape))):
        letter = letters[place - stacked]
        if "norm" in name and len(letters) == 1 and "bias" not in name:
            continue
        for axis in allowed[letter] or ():
            if axis in axes or (len(letters) - letters.count("3") == 1 and axis != TENSOR_AXIS):
                continue
            if shape[place] % mesh.shape[axis]:
                whole.append(f"{letter.upper()}={shape[place]} over {axis}={mesh.shape[axis]}")
                continue
            axes[place] = axis
            break
    return Placement(PartitionSpec(*axes), tuple(whole))


def sharding_of(
    mesh: Mesh, rules: Rules | None = None
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The function by which `tte_jax.weights.hf.load` places parameters on `mesh`."""
    chosen = rules or Rules()
    return lambda path, shape: NamedSharding(mesh, placement(path, shape, mesh, chosen).spec)


def batch_spec(rows: int, mesh: AnyMesh, rules: Rules | None = None) -> PartitionSpec:
    """Splits the leading dimension over the batch axes; a batch they do not divide stays whole.

    So does one where they all have size 1: there is nothing to split, and a type that says so
    would only forbid operations (reshapes).
    """
    axes = (rules or Rules()).B
    ways = prod(mesh.shape[axis] for axis in axes)
    return PartitionSpec() if ways == 1 or rows % ways else PartitionSpec(axes)
