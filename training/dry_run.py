"""What a run would take on each device, before anything is allocated.

    python -m training.contrastive --config paper-7b --model 7B --mesh data=8,fsdp=8 --dry-run

The step's real programs are traced with abstract arrays on an abstract mesh of the given sizes, so
a sharding that does not fit is an error here and not on the pod; nothing is compiled, no device is
needed. Bytes of what stays (weights, adapters, optimiser, vectors) are exact. Activations are the
estimate of `tte_jax.plan` for one sub-batch, and every layer's input where layers are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from training import flops, parameters
from training.batches import SubBatch
from training.contrastive_loss import BATCH_AXES, Labels
from training.parameters import Split
from tte_jax import plan, sharding
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.models.shapes import QWEN2_VL, shape_config
from tte_jax.preprocess.vision_plan import plan_vision
from tte_jax.weights import hub

if TYPE_CHECKING:
    from training.contrastive import Config

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Per device, of one step.

    Attributes:
      parameters, trained: numbers of the whole model, and those that learn.
      bytes: by what they are for; `total` their sum.
      sub_batches: forward and backward calls of a step.
      flops: model FLOPs; hardware_flops: with what GradCache and rematerialisation compute again.
      shardings: path → dtype[shape] @ spec, of what is trained.
    """

    parameters: int
    trained: int
    bytes: dict[str, int]
    sub_batches: int
    flops: float
    hardware_flops: float
    shardings: dict[str, str]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def estimate(config: Config) -> Estimate:
    """For the configuration's longest row length, all of whose tokens are taken for real.

    Raises:
      InvalidInputError: sizes that do not fit the mesh.
    """
    from training.contrastive import check, programs

    sizes = sharding.parse_mesh(config.mesh or "data=1")
    mesh = sharding.abstract_mesh(**sizes)
    total, devices = sizes["data"] * sizes["fsdp"], prod(sizes.values())
    check(config, total, list(range(total)))
    model = shape_of(config.model)
    length = max(config.packing.lengths)
    rows = config.packing.rows(length)
    # What a mesh does not divide is refused there.
    forward = plan.plan(
        model,
        sizes,
        batch=rows * total,
        tokens=length,
        patches=config.packing.patches if model.vision else 0,
        dtype=jnp.dtype(config.dtype),
    )
    parts, trained, frozen = abstract(config, model, mesh)
    # --- trace the step's own programs --------------------------------------------------------
    cache = programs(config, parts, mesh)
    vectors, size = config.global_batch * config.counts.vectors, model.text.hidden_size
    sequences = vectors // total
    batch = sub_batch(config, model, mesh, rows, length)
    buffer = laid((vectors, size), jnp.float32, mesh, PartitionSpec(BATCH_AXES))
    whole = {"model": trained, "log_scale": laid((), jnp.float32, mesh, PartitionSpec())}
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.sharding.use_abstract_mesh(mesh):
        out = jax.eval_shape(cache.forward, whole, frozen, batch, key, buffer)
        assert out.shape == buffer.shape
        known = labels(config, mesh)
        (loss, _), (d_buffer, grads) = jax.eval_shape(cache.loss, buffer, whole, known)
        assert loss.shape == ()
        grads = jax.eval_shape(cache.backward, whole, frozen, batch, key, d_buffer, whole)
        assert jax.tree.structure(grads) == jax.tree.structure(whole)
        state = jax.eval_shape(config.optimiser.make(config.steps).init, whole)
    # --- count --------------------------------------------------------------------------------
    # The most there can be: each sequence in a row of its own.
    calls = -(-sequences // rows)
    sizes_of = {
        "weights": held(frozen),
        "trained": held(trained),
        "gradients": held(trained),
        "optimiser": held(state),
        "vectors and their gradients": 2 * sequences * size * 4,
        "sub-batch": held(batch),
        "activations": forward.activations,
    }
    if config.remat:
        kept = model.text.layers * rows * length * model.text.hidden_size
        sizes_of["kept layer inputs"] = kept * jnp.dtype(config.dtype).itemsize
    costs = flops.costs(model)
    full = config.tuning.method == "full"
    room = config.packing.patches if model.vision else 0

    def work_of(full: bool, tower: bool) -> float:
        one = costs.training(
            tokens=length,
            squares=length**2,
            patches=room,
            patch_squares=room**2,
            full=full,
            tower=tower,
        )
        return one * vectors

    work = work_of(full, full and config.tuning.vision)
    once = work_of(False, False) / 2  # one more forward, about
    again = once * (int(config.remat) + int(config.grad_cache))
    return Estimate(
        parameters=forward.parameters,
        trained=parameters.count(trained),
        bytes=sizes_of,
        sub_batches=calls,
        flops=work / devices,
        hardware_flops=(work + again) / devices,
        shardings={
            name: f"{leaf.dtype}{list(leaf.shape)} @ {tuple(leaf.sharding.spec)}"
            for name, leaf in _leaves(trained)
        },
    )


def abstract(
    config: Config, model: ModelConfig, mesh: AbstractMesh
) -> tuple[Split, dict[str, Any], dict[str, Any]]:
    """`parameters.split` of shapes with shardings."""
    dtype, rules = jnp.dtype(config.dtype), sharding.Rules()
    made = nnx.eval_shape(lambda: MultimodalLM(model, rngs=nnx.Rngs(0), dtype=dtype))
    graph, _ = nnx.split(made)
    values = {
        path: laid(leaf.shape, dtype, mesh, sharding.placement(path, leaf.shape, mesh, rules).spec)
        for path, leaf in plan.abstract_parameters(model, dtype).items()
    }
    parts = Split(graph, model, config.tuning, dtype)
    if config.tuning.method == "full":
        frozen = {
            p: v for p, v in values.items() if p.startswith("visual.") and not config.tuning.vision
        }
        trained = {
            p: laid(v.shape, jnp.float32, mesh, v.sharding.spec)
            for p, v in values.items()
            if p not in frozen
        }
        return parts, trained, frozen
    trained = {}
    for entry in parameters.targeted(model, config.tuning):
        shapes = parameters.adapter_shapes(entry, values[entry.path], config.tuning)
        trained[entry.path] = {
            name: laid(shape, jnp.float32, mesh, spec) for name, (shape, spec) in shapes.items()
        }
    return parts, trained, values


def sub_batch(
    config: Config, model: ModelConfig, mesh: AbstractMesh, rows: int, length: int
) -> SubBatch:
    """A sub-batch's shapes, with one pack of patches for each row where the model sees."""
    total = mesh.shape["data"] * mesh.shape["fsdp"] * rows
    slots, spec = config.packing.slots, PartitionSpec(BATCH_AXES)

    def i32(*shape: int) -> Any:
        return laid((total, *shape), jnp.int32, mesh, spec)

    made = SubBatch(
        ids=i32(length),
        sequence=i32(length),
        positions=i32(3, length),
        ends=i32(slots),
        dest=i32(slots),
    )
    if model.vision is None:
        return made
    room = config.packing.patches
    empty = plan_vision([], bucket=room, **model.vision.plan)
    patches = laid((total, room, model.vision.patch_values), jnp.float32, mesh, spec)
    arrays = tuple(laid((total, *x.shape), x.dtype, mesh, spec) for x in empty.arrays)
    return SubBatch(**{**vars(made), "vis_idx": i32(length), "patches": patches, "plan": arrays})


def labels(config: Config, mesh: AbstractMesh) -> Labels:
    b, p, k = config.global_batch, config.counts.positives, config.counts.negatives
    spec = PartitionSpec(BATCH_AXES)

    def of(dtype: Any, *shape: int) -> Any:
        return laid((b, *shape), dtype, mesh, spec)

    return Labels(
        weight=of(jnp.float32),
        group=of(jnp.uint32, 2),
        positive_key=of(jnp.uint32, p, 2),
        positive_mask=of(jnp.bool_, p),
        negative_key=of(jnp.uint32, k, 2),
        negative_mask=of(jnp.bool_, k),
        positive_score=of(jnp.float32),
        negative_score=of(jnp.float32, k),
    )


def laid(shape: Any, dtype: Any, mesh: AbstractMesh, spec: PartitionSpec) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))


def held(tree: Any) -> int:
    """Bytes on one device."""
    size = 0
    for leaf in jax.tree.leaves(tree):
        ways = 1
        if leaf.sharding is not None:  # a counter has none
            spec, mesh = leaf.sharding.spec, leaf.sharding.mesh
            axes = [a for one in spec if one is not None for a in np.atleast_1d(np.array(one))]
            ways = prod(mesh.shape[str(a)] for a in axes)
        size += prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // ways
    return size


def shape_of(name: str) -> ModelConfig:
    """A published shape by name, or the configuration of a model directory."""
    return shape_config(name) if name in QWEN2_VL else model_config(Path(hub.local(name)))


def show(config: Config) -> Estimate:
    """Prints the estimate."""
    made = estimate(config)
    out = Console(width=110)
    out.print(
        f"{config.model}: {made.parameters:,} parameters, {made.trained:,} trained"
        f" ({config.tuning.method}); mesh {config.mesh or 'data=1'}"
    )
    table = Table("trained parameter", "dtype, shape @ mesh axes", title="shardings")
    for name, said in made.shardings.items():
        table.add_row(name, said)
    out.print(table)
    table = Table("per device", "bytes", "GiB", title="memory")
    for name, size in {**made.bytes, "total": made.total}.items():
        table.add_row(name, f"{size:,}", f"{size / GIB:.3f}")
    out.print(table)
    out.print(
        f"A step: at most {made.sub_batches} sub-batches, forward and backward;"
        f" {made.flops / 1e12:,.1f} TFLOP per device, {made.hardware_flops / 1e12:,.1f} with what"
        " is computed again, if every sequence were as long as the longest row."
    )
    return made


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in found]
