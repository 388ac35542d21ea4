"""What an optimiser sees of a model: all of its parameters, or adapters beside a frozen base.

A model is taken apart into three: `graph` (static), `trained` and `frozen`, both plain dicts by
dotted path. `Split.assemble` puts it together again inside a step, so trainers are written once for
full fine-tuning, LoRA and DoRA. Trained values are float32 whatever the model computes in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from tte_jax.errors import InvalidInputError
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.nn.linear import AdaptedWeight
from tte_jax.weights.adapter import Adapter
from tte_jax.weights.table import Entry, entries

Method = Literal["lora", "dora", "full"]
Tree = dict[str, Any]

# The projections of the text decoder, as the authors' adapters have them.
DECODER = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Tuning:
    """Which parameters are trained.

    Attributes:
      method: adapters of one kind, or "full".
      rank: R; alpha: the adapter's scale is alpha / rank.
      dropout: share of an adapter's input that is dropped while training.
      targets: regular expression that a module's name must end with, after a dot; PEFT's meaning
        of a `target_modules` string with `.*\\.` in front.
      vision: whether full fine-tuning changes the vision tower as well.
    """

    method: Method = "lora"
    rank: int = 16
    alpha: float = 64.0
    dropout: float = 0.1
    targets: str = DECODER
    vision: bool = False


@dataclass(frozen=True)
class Split:
    """A model taken apart.

    Attributes:
      graph: the module's structure.
      config: of the model.
      tuning: what was asked for.
      dtype: in which parameters enter the computation.
    """

    graph: Any
    config: ModelConfig
    tuning: Tuning
    dtype: Any

    def assemble(self, trained: Tree, frozen: Tree, key: Array | None = None) -> MultimodalLM:
        """The module; a pytree for use inside a step.

        Args:
          key: of the adapters' dropout; None = no dropout.
        """
        values: Tree = dict(frozen)
        scale = self.tuning.alpha / self.tuning.rank
        for number, (path, value) in enumerate(sorted(trained.items())):
            if not isinstance(value, dict):
                values[path] = value.astype(self.dtype)
                continue
            base, keys = frozen[path], None
            if key is not None and self.tuning.dropout > 0:
                keys = jax.random.fold_in(key, number)
                if _stacked(path):
                    keys = jax.random.split(keys, base.shape[0])
            values[path] = AdaptedWeight(
                w=base, **value, key=keys, scale=scale, rate=self.tuning.dropout
            )
        return nnx.merge(self.graph, nnx.State(nested(values)))


def split(model: MultimodalLM, tuning: Tuning, *, key: Array) -> tuple[Split, Tree, Tree]:
    """(`Split`, trained, frozen) of a model; its arrays are taken over, not copied.

    New adapters change nothing: A is random, B is zero, and DoRA's magnitudes are the weights'
    norms. They lie on the mesh as the weight's own dimensions do.

    Raises:
      InvalidInputError: no module has a name that ends with `targets`, or one cannot be adapted.
    """
    graph, state = nnx.split(model)
    values = _flat(nnx.to_pure_dict(state))
    dtype = model.text.norm_d[...].dtype
    parts = Split(graph, model.config, tuning, dtype)
    if tuning.method == "full":
        kept = {p: v for p, v in values.items() if p.startswith("visual.") and not tuning.vision}
        trained = {p: v.astype(jnp.float32) for p, v in values.items() if p not in kept}
        return parts, trained, kept
    trained = {}
    for number, entry in enumerate(targeted(model.config, tuning)):
        base = values[entry.path]
        trained[entry.path] = _adapter(entry, base, tuning, jax.random.fold_in(key, number))
    return parts, trained, values


def targeted(config: ModelConfig, tuning: Tuning) -> list[Entry]:
    """The parameters that get adapters, in the table's order."""
    pattern = re.compile(rf"(.*\.)?({tuning.targets})")
    found = [
        entry
        for entry in entries(config)
        if entry.inputs and pattern.fullmatch(_module(entry).format(l=0))
    ]
    if not found:
        names = ", ".join(_module(e).format(l=0) for e in entries(config) if e.inputs)
        raise InvalidInputError(
            f"targets {tuning.targets!r} is the end of no linear layer's name; there are {names}.",
            field="targets",
        )
    if bad := [e.path for e in found if e.path == "text.head_dv" or len(e.hf_shape) > 2]:
        raise InvalidInputError(
            f"targets {tuning.targets!r} means {', '.join(bad)}, which cannot have an adapter while"
            " training; narrow it to the layers' projections.",
            field="targets",
        )
    return found


def on_mesh(tree: Any, mesh: Any) -> Any:
    """Puts what lies on one device (counters, scalars) on the whole mesh."""
    if mesh is None:
        return tree
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, where), tree
    )


def count(tree: Tree) -> int:
    """Numbers in all arrays."""
    return sum(prod(x.shape) for x in jax.tree.leaves(tree))


def to_peft(parts: Split, trained: Tree, *, base: str) -> Adapter:
    """The adapters as PEFT saves them; `tte_jax.weights.adapter.save` writes them.

    Args:
      trained: arrays on the host or the device, wholly readable by this process.
      base: path or hub id of the model that was trained on.
    """
    tuning, tensors = parts.tuning, {}
    for entry in targeted(parts.config, tuning):
        found = trained[entry.path]
        a, b = np.asarray(found["a"], np.float32), np.asarray(found["b"], np.float32)
        layers = range(a.shape[0]) if entry.stacked else [None]
        for layer in layers:
            at = () if layer is None else (layer,)
            name = _module(entry).format(l=layer)
            name = f"base_model.model.{_in_memory(name, parts.config)}"
            rank = tuning.rank
            tensors[f"{name}.lora_A.weight"] = a[at].reshape(-1, rank).T.copy()
            tensors[f"{name}.lora_B.weight"] = b[at].reshape(rank, -1).T.copy()
            if "magnitude" in found:
                magnitude = np.asarray(found["magnitude"], np.float32)[at]
                tensors[f"{name}.lora_magnitude_vector"] = magnitude.reshape(-1).copy()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": rf"(.*\.)?({tuning.targets})",
        "use_dora": tuning.method == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return Adapter(base, config, tensors)  # pyright: ignore[reportArgumentType]  # for messages


def adapter_shapes(
    entry: Entry, base: Any, tuning: Tuning
) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """Shape and placement of each part of a weight's adapter: dimensions lie as the weight's do.

    Args:
      base: the weight, or its shape with a sharding.
    """
    first, rank = int(entry.stacked), tuning.rank
    spec = (None,) * len(base.shape)
    if isinstance(base.sharding, NamedSharding):
        spec = (*base.sharding.spec, *spec[len(base.sharding.spec) :])
    end = first + entry.inputs
    stack, inputs, outputs = base.shape[:first], base.shape[first:end], base.shape[end:]
    found = {
        "a": ((*stack, *inputs, rank), PartitionSpec(*spec[:end], None)),
        "b": ((*stack, rank, *outputs), PartitionSpec(*spec[:first], None, *spec[end:])),
    }
    if tuning.method == "dora":
        found["magnitude"] = ((*stack, *outputs), PartitionSpec(*spec[:first], *spec[end:]))
    return found


def _adapter(entry: Entry, base: Array, tuning: Tuning, key: Array) -> Mapping[str, Array]:
    shapes = adapter_shapes(entry, base, tuning)
    first = int(entry.stacked)
    axes = tuple(range(first, first + entry.inputs))
    # Kaiming's uniform with a = sqrt(5), as PEFT draws A: bound 1 / sqrt(inputs).
    bound = prod(base.shape[i] for i in axes) ** -0.5

    def made(base: Array) -> dict[str, Array]:
        found = {
            "a": jax.random.uniform(key, shapes["a"][0], jnp.float32, -bound, bound),
            "b": jnp.zeros(shapes["b"][0], jnp.float32),
        }
        if "magnitude" in shapes:
            norm = jnp.sum(jnp.square(base.astype(jnp.float32)), axis=axes)
            found["magnitude"] = jnp.sqrt(norm)
        return found

    where = None
    if isinstance(base.sharding, NamedSharding):
        mesh = base.sharding.mesh
        where = {name: NamedSharding(mesh, spec) for name, (_, spec) in shapes.items()}
    return jax.jit(made, out_shardings=where)(base)


def _module(entry: Entry) -> str:
    return entry.name.removesuffix(".weight")


def _in_memory(module: str, config: ModelConfig) -> str:
    """The module's name in a model of transformers 5."""
    if config.vision is None:
        return module
    return "model." + (
        module if module.startswith("visual.") else re.sub(r"^model\.", "language_model.", module)
    )


def _stacked(path: str) -> bool:
    return ".layers." in path or ".blocks." in path


def _flat(tree: Mapping[str, Any], before: str = "") -> Tree:
    flat: Tree = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def nested(flat: Tree) -> Tree:
    tree: Tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = nnx.Param(value)
    return tree
