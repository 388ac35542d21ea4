"""What a model takes on a mesh, per device, before anything is allocated.

Weights come from `jax.eval_shape` of the real module and the real sharding rules; the rest is
arithmetic over the configuration, for one forward pass without gradients. Per device, with
b = batch / (data * fsdp), n = N / tp, k = K / tp, f = F / tp, v = V / tp (each whole where the
mesh does not divide it) and s bytes per value:

    weights      sum over parameters of their local shape * s
    KV cache     2 * L * b * T * k * H * s
    activations  residual stream, its input and its norm   3 * b * T * D * s
                 + the larger of
                   attention   b * n * T * T * (4 + 4 + s)   (float32 logits and softmax, weights)
                               + b * T * H * (2 n + 2 k) * s (queries, output, keys, values)
                   MLP         3 * b * T * f * s             (gate, up, product)
                 + one layer's weights gathered over fsdp
                 + last-token logits   b * v * 4
    vision       the same with E, the tower's heads and MLP, and P patches in one pack, which every
                 device of a batch group computes whole; it is over before the text begins, so the
                 larger of the two counts

XLA may fuse some of it away and adds workspace of its own, so activations are an estimate; weights
and cache are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tte_jax.errors import InvalidInputError
from tte_jax.models.config import ModelConfig, TextConfig, VisionConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.sharding import AnyMesh, Placement, Rules, abstract_mesh, batch_spec, placement


@dataclass(frozen=True)
class Parameter:
    """One parameter on a mesh: whole shape, where it goes, and bytes on each device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    placed: Placement
    device_bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes per device, and what the mesh could not split.

    Attributes:
      parameters: number of parameters of the model.
      weights, kv_cache, activations: bytes per device.
      whole: what stays whole on an axis that should split it.
    """

    parameters: int
    weights: int
    kv_cache: int
    activations: int
    whole: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def abstract_parameters(
    config: ModelConfig, dtype: Any = jnp.bfloat16
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by dotted path; nothing is allocated."""
    module = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    pure = nnx.to_pure_dict(nnx.state(module))
    leaves = jax.tree_util.tree_leaves_with_path(pure)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def placed_parameters(
    config: ModelConfig, mesh: AnyMesh, *, dtype: Any = jnp.bfloat16, rules: Rules | None = None
) -> list[Parameter]:
    """Every parameter with its placement."""
    out = []
    for path, leaf in abstract_parameters(config, dtype).items():
        placed = placement(path, leaf.shape, mesh, rules or Rules())
        split = prod(mesh.shape[axis] for axis in placed.spec if axis is not None)
        size = prod(leaf.shape) * leaf.dtype.itemsize // split
        out.append(Parameter(path, leaf.shape, str(leaf.dtype), placed, size))
    return out


def unsplit(config: ModelConfig, mesh: AnyMesh, rules: Rules | None = None) -> tuple[str, ...]:
    """What the mesh does not divide and every device of an axis holds whole: "K=2 over tp=4"."""
    return _whole(placed_parameters(config, mesh, rules=rules))


def _whole(placed: list[Parameter]) -> tuple[str, ...]:
    return tuple(sorted({note for p in placed for note in p.placed.whole}))


def dump(parameters: list[Parameter]) -> str:
    """The placements as text, one parameter a line, for golden files and for reading."""
    rows = [
        (
            p.path,
            f"{p.dtype}{list(p.shape)}",
            "P(" + ", ".join(a or "-" for a in p.placed.spec) + ")",
            f"{p.device_bytes}",
            "; ".join(f"whole: {w}" for w in p.placed.whole),
        )
        for p in parameters
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def plan(
    config: ModelConfig,
    sizes: Mapping[str, int],
    *,
    batch: int,
    tokens: int,
    patches: int = 0,
    dtype: Any = jnp.bfloat16,
    rules: Rules | None = None,
) -> Plan:
    """Bytes per device for one forward pass of `batch` sequences of `tokens` tokens.

    Args:
      sizes: data, fsdp and tp.
      patches: image patches in the pack of the vision tower; 0 = none.
      dtype: of weights, cache and activations.

    Raises:
      InvalidInputError: the mesh does not divide the model: something other than key/value heads
        would be stored or computed whole on every device of an axis.
    """
    mesh = abstract_mesh(**sizes)
    placed = placed_parameters(config, mesh, dtype=dtype, rules=rules)
    whole = _whole(placed)
    if wasted := [note for note in whole if not note.startswith("K=")]:
        c = config.text
        raise InvalidInputError(
            f"The mesh {', '.join(f'{a}={n}' for a, n in sizes.items())} does not divide this"
            f" model: {'; '.join(wasted)}. tp must divide the {c.heads} query heads"
            + (f", the tower's {config.vision.heads}" if config.vision else "")
            + f" and {c.intermediate_size} (MLP); fsdp must divide {c.hidden_size} (hidden size).",
            field="mesh",
            reason="MESH_DOES_NOT_DIVIDE",
        )
    size = jnp.dtype(dtype).itemsize
    rows = batch if not batch_spec(batch, mesh, rules) else batch // (sizes["data"] * sizes["fsdp"])
    if rows == batch and sizes["data"] * sizes["fsdp"] > 1:
        whole += (f"B={batch} over data*fsdp={sizes['data'] * sizes['fsdp']}",)
    c, tp = config.text, sizes["tp"]
    kv_heads = c.kv_heads if c.kv_heads % tp else c.kv_heads // tp
    peak = _text(c, rows, tokens, tp, size) + _layer(placed, "text.layers.", c.layers, sizes)
    if config.vision is not None and patches:
        v = config.vision
        peak = max(peak, _tower(v, patches, tp, size) + _layer(placed, "visual.", v.depth, sizes))
    return Plan(
        parameters=sum(prod(p.shape) for p in placed),
        weights=sum(p.device_bytes for p in placed),
        kv_cache=2 * c.layers * rows * tokens * kv_heads * c.head_dim * size,
        activations=peak,
        whole=whole,
    )


def _text(c: TextConfig, rows: int, tokens: int, tp: int, size: int) -> int:
    heads = c.heads // tp
    kv_heads = c.kv_heads if c.kv_heads % tp else c.kv_heads // tp
    places = rows * tokens
    attention = places * heads * tokens * (8 + size)
    attention += places * c.head_dim * 2 * (heads + kv_heads) * size
    mlp = 3 * places * (c.intermediate_size // tp) * size
    logits = rows * (c.vocab_size // tp) * 4
    return 3 * places * c.hidden_size * size + max(attention, mlp) + logits


def _tower(c: VisionConfig, patches: int, tp: int, size: int) -> int:
    heads = c.heads // tp
    attention = heads * patches**2 * (8 + size) + 4 * patches * c.embed_dim // tp * size
    mlp = 3 * patches * c.inner // tp * size
    return 3 * patches * c.embed_dim * size + max(attention, mlp)


def _layer(placed: list[Parameter], prefix: str, layers: int, sizes: Mapping[str, int]) -> int:
    """Bytes of one layer's weights once they are gathered over fsdp."""
    gathered = 0
    for p in placed:
        if p.path.startswith(prefix) and p.shape[0] == layers:
            split = sizes["fsdp"] if "fsdp" in p.placed.spec else 1
            gathered += p.device_bytes * split // layers
    return gathered
