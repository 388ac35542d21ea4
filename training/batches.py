"""Sequences of unequal length, packed into sub-batches of fixed shapes, one part for each shard.

A shard is what one batch coordinate (data, fsdp) of the mesh reads; tp devices share it. Every
sequence goes to the shortest row length of the ladder that holds it, several to a row, and rows
stand together in sub-batches of about `Packing.tokens` tokens a shard. A sub-batch is one call of a
compiled program, so all shards need as many of each length: what one shard has less is padding.

    one row of 12 tokens with two sequences, and what sees what:

        ids        a a a a b b b b b . . .        a: itself, causally; b: likewise; pads: nothing
        sequence   1 1 1 1 2 2 2 2 2 0 0 0
        ends       3 8                            the last tokens, whose states are pooled

Host work on NumPy; `place` puts it on the devices. Several processes agree on shapes through
`agree`, one small exchange a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from training.contrastive_loss import BATCH_AXES
from tte_jax.engine.buckets import smallest
from tte_jax.engine.inputs import ImageInput, ModelInput
from tte_jax.engine.vision import Pack, pack_images
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.vision_plan import plan_vision
from tte_jax.sharding import make_mesh

Leaf = Any
Agree = Callable[[np.ndarray], np.ndarray]
"""Element-wise maximum over all processes of the job."""


@dataclass(frozen=True)
class Packing:
    """Shapes of the sub-batches; each that occurs is compiled once.

    Attributes:
      lengths: lengths of rows, tokens; the largest is the longest sequence.
      tokens: tokens of a sub-batch on one shard; rows = tokens / length, at least one.
      slots: most sequences in a row.
      patches: image patches in one pack of the vision tower; the largest image.
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512)
    tokens: int = 4096
    slots: int = 8
    patches: int = 1024

    def rows(self, length: int) -> int:
        return max(1, self.tokens // length)


@dataclass(frozen=True, eq=False)
class Item:
    """One sequence of a shard.

    Attributes:
      input: its tokens, positions and images.
      dest: where its vector goes among the shard's; -1 = nobody asks for it.
      learnt: [T] float32 weights of the next-token loss, at the token that predicts; None = none.
    """

    input: ModelInput
    dest: int = -1
    learnt: np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SubBatch:
    """R rows of T tokens, all shards together; R = shards * rows.

    Attributes:
      ids, sequence: [R T] int32; sequence 1.. of a row, 0 = pad.
      positions: [R 3 T] int32.
      ends: [R S] int32, column of each sequence's last token; dest: [R S] int32, see `GradCache`.
      targets: [R T] int32, the next tokens; learnt: [R T] float32 their weights. None when nothing
        is learnt as text.
      vis_idx: [R T] int32, row of the table of features, -1 at text; None without images.
      patches: [G P C] float32; plan: what the tower takes beside them.
    """

    ids: Leaf
    sequence: Leaf
    positions: Leaf
    ends: Leaf
    dest: Leaf
    targets: Leaf = None
    learnt: Leaf = None
    vis_idx: Leaf = None
    patches: Leaf = None
    plan: tuple[Leaf, ...] = ()


@dataclass(frozen=True)
class Fill:
    """How full the sub-batches of this process are.

    Attributes:
      tokens: real tokens; places: of all rows; patches, patch_places: of images, likewise.
      squares: sum of squared sequence lengths, patch_squares of squared image sizes; what attention
        costs.
    """

    tokens: int = 0
    places: int = 0
    patches: int = 0
    patch_places: int = 0
    squares: int = 0
    patch_squares: int = 0

    @property
    def pad_share(self) -> float:
        return 1 - self.tokens / max(self.places, 1)


def encode(
    model: MultimodalLM, batch: SubBatch, *, remat: bool, unroll: bool = False
) -> Float[Array, "R S D"]:
    """The hidden state of every sequence's last token, float32, not normalised."""
    hidden = states(model, batch, remat=remat, unroll=unroll)
    at = batch.ends[:, None, :] == jnp.arange(hidden.shape[1])[None, :, None]
    # A product, not a gather: exact, and it needs no rule where rows are split over devices.
    return jnp.einsum(
        "rtd,rts->rsd", hidden, at.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def states(
    model: MultimodalLM, batch: SubBatch, *, remat: bool, unroll: bool = False
) -> Float[Array, "R T D"]:
    """Hidden states of all tokens; a sequence sees itself only."""
    vis = None
    if batch.patches is not None:
        vis = model.encode_images(batch.patches, *batch.plan, remat=remat, unroll=unroll)
    length = batch.ids.shape[1]
    same = batch.sequence[:, :, None] == batch.sequence[:, None, :]
    hidden, _ = model.forward(
        batch.ids,
        valid=batch.sequence > 0,
        positions=batch.positions,
        vis=vis,
        vis_idx=batch.vis_idx,
        mask=jnp.tril(jnp.ones((length, length), bool))[None] & same,
        remat=remat,
        unroll=unroll,
    )
    return hidden


def pack(
    shards: Sequence[Sequence[Item]],
    packing: Packing,
    config: ModelConfig,
    *,
    nowhere: int,
    text: bool = False,
    agree: Agree = lambda x: x,
) -> tuple[list[list[SubBatch]], Fill]:
    """Sub-batches of NumPy arrays: for each, the part of every shard of this process.

    The same items make the same sub-batches; longest sequences first in each length.

    Args:
      shards: the sequences of each shard of this process.
      nowhere: the `dest` of empty places: any number beyond a shard's vectors.
      text: next tokens are learnt; `targets` and `learnt` are there.

    Raises:
      InvalidInputError: a sequence or an image is longer than the ladder.
    """
    rows = [_rows(items, packing) for items in shards]
    needed = [max(len(by_length[t]) for by_length in rows) for t in packing.lengths]
    counts = [
        -(-int(n) // packing.rows(t))
        for n, t in zip(agree(np.array(needed, np.int64)), packing.lengths, strict=True)
    ]
    parts: list[list[_Part]] = []
    for length, count in zip(packing.lengths, counts, strict=True):
        size = packing.rows(length)
        for number in range(count):
            here = slice(number * size, (number + 1) * size)
            parts.append([_Part(length, by[length][here], packing) for by in rows])
    packs = np.array([max(len(one.packs) for one in part) for part in parts], np.int64)
    if len(packs) and config.vision is not None:
        packs = agree(packs)
    made = []
    for part, count in zip(parts, packs, strict=True):
        room = 0 if not count else 1 << int(count - 1).bit_length()
        made.append([one.arrays(room, config, nowhere, text) for one in part])
    return made, _fill(parts, packs, packing)


def place(
    parts: Sequence[SubBatch],
    mesh: Mesh | None,
    config: ModelConfig,
    shards: Sequence[int] = (0,),
) -> SubBatch:
    """One sub-batch on the devices, split along its rows.

    Args:
      parts: of each shard of this process; shards: their numbers on the mesh.
    """
    if mesh is not None and parts[0].patches is not None and config.vision is not None:
        features = parts[0].patches.shape[0] * parts[0].patches.shape[1] // config.vision.merged
        parts = [
            _shifted(part, number * features) for part, number in zip(parts, shards, strict=True)
        ]
    return jax.tree.map(lambda *x: spread(x, mesh, shards), *parts)


def spread(parts: Sequence[np.ndarray], mesh: Mesh | None, shards: Sequence[int]) -> jax.Array:
    """Equal parts of all shards as one array, split over the batch axes along its rows."""
    if mesh is None:
        (only,) = parts
        return jnp.asarray(only)
    rows, total = len(parts[0]), mesh.shape["data"] * mesh.shape["fsdp"]
    by_shard = dict(zip(shards, parts, strict=True))
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.make_array_from_callback(
        (total * rows, *parts[0].shape[1:]),
        where,
        lambda index: by_shard[_start(index) // rows],
    )


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices of the job, those of a process together: a process reads the
    examples of its devices' shards, which are a range of a step's.

    Raises InvalidInputError when they are not as many.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], tp=sizes["tp"], devices=devices)


def local_shards(mesh: Mesh | None) -> list[int]:
    """Numbers of the shards that this process's devices hold, ascending."""
    if mesh is None:
        return [0]
    total = mesh.shape["data"] * mesh.shape["fsdp"]
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    held = where.addressable_devices_indices_map((total,)).values()
    return sorted({_start(index) for index in held})


def _start(index: Any) -> int:
    """The first row that a device holds, of JAX's index of its part."""
    return index[0].start or 0


def agreed(x: np.ndarray) -> np.ndarray:
    """The largest of each element over all processes; every process must call it."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x)).max(0)


def summed(x: np.ndarray, *, share: float) -> float:
    """The sum of a number over the job; processes with the same shards count once.

    Args:
      share: how much of all shards this process holds.
    """
    if jax.process_count() == 1:
        return float(x[0])
    from jax.experimental import multihost_utils

    everyone = np.asarray(multihost_utils.process_allgather(x)).sum()
    return float(everyone) / (share * jax.process_count())


@dataclass
class _Row:
    items: list[Item] = field(default_factory=list)
    used: int = 0


def _rows(items: Sequence[Item], packing: Packing) -> dict[int, list[_Row]]:
    """First fit, longest first; ties in the given order."""
    rows: dict[int, list[_Row]] = {length: [] for length in packing.lengths}
    for item in sorted(items, key=lambda i: -i.input.tokens):
        n = item.input.tokens
        length = smallest(n, packing.lengths, what="a sequence")
        fits = (
            row for row in rows[length] if row.used + n <= length and len(row.items) < packing.slots
        )
        row = next(fits, None)
        if row is None:
            row = _Row()
            rows[length].append(row)
        row.items.append(item)
        row.used += n
    return rows


class _Part:
    """One shard's part of a sub-batch."""

    def __init__(self, length: int, rows: Sequence[_Row], packing: Packing) -> None:
        self.length, self.rows, self.packing = length, rows, packing
        images: dict[str, ImageInput] = {}
        for row in rows:
            for item in row.items:
                images |= {image.key: image for image in item.input.images}
        self.packs: list[Pack] = pack_images(list(images.values()), [packing.patches])

    def arrays(self, packs: int, config: ModelConfig, nowhere: int, text: bool) -> SubBatch:
        rows, length, slots = self.packing.rows(self.length), self.length, self.packing.slots
        ids, sequence = np.zeros((2, rows, length), np.int32)
        positions = np.zeros((rows, 3, length), np.int32)
        ends = np.zeros((rows, slots), np.int32)
        dest = np.full((rows, slots), nowhere, np.int32)
        vis_idx = np.full((rows, length), -1, np.int32)
        learnt = np.zeros((rows, length), np.float32)
        table = self._table(config) if packs else {}
        for r, row in enumerate(self.rows):
            at = 0
            for s, item in enumerate(row.items):
                one, end = item.input, at + item.input.tokens
                ids[r, at:end], sequence[r, at:end] = one.ids, s + 1
                positions[r, :, at:end] = one.positions
                ends[r, s] = end - 1
                if item.dest >= 0:
                    dest[r, s] = item.dest
                if one.images:
                    found = np.concatenate([table[image.key] for image in one.images])
                    vis_idx[r, at:end][one.is_media] = found
                if item.learnt is not None:
                    learnt[r, at:end] = item.learnt
                at = end
        targets = np.roll(ids, -1, axis=1)
        made = SubBatch(
            ids=ids,
            sequence=sequence,
            positions=positions,
            ends=ends,
            dest=dest,
            targets=targets if text else None,
            learnt=learnt if text else None,
            vis_idx=vis_idx if packs else None,
        )
        return self._with_images(made, packs, config) if packs else made

    def _table(self, config: ModelConfig) -> dict[str, np.ndarray]:
        """Rows of the shard's feature table by image."""
        assert config.vision is not None
        merged, found = config.vision.merged, {}
        for number, one in enumerate(self.packs):
            at = number * (self.packing.patches // merged)
            for image in one.images:
                size = len(image.patches) // merged
                found[image.key] = np.arange(at, at + size, dtype=np.int32)
                at += size
        return found

    def _with_images(self, made: SubBatch, packs: int, config: ModelConfig) -> SubBatch:
        vision, room = config.vision, self.packing.patches
        assert vision is not None
        patches = np.zeros((packs, room, vision.patch_values), np.float32)
        grids = [[image.grid for image in one.images] for one in self.packs]
        plans = [plan_vision(g, bucket=room, **vision.plan) for g in grids]
        plans += [plan_vision([], bucket=room, **vision.plan)] * (packs - len(plans))
        for number, one in enumerate(self.packs):
            patches[number, : one.used] = np.concatenate([i.patches for i in one.images])
        plan = tuple(np.stack(x) for x in zip(*(one.arrays for one in plans), strict=True))
        fields = {k: v for k, v in vars(made).items() if k not in ("patches", "plan")}
        return SubBatch(**fields, patches=patches, plan=plan)


def _shifted(part: SubBatch, by: int) -> SubBatch:
    shifted = np.where(part.vis_idx >= 0, part.vis_idx + by, -1).astype(np.int32)
    return SubBatch(**{**vars(part), "vis_idx": shifted})


def _fill(parts: Sequence[Sequence[_Part]], packs: np.ndarray, packing: Packing) -> Fill:
    every = [one for part in parts for one in part]
    items = [item for one in every for row in one.rows for item in row.items]
    images = [len(i.patches) for one in every for p in one.packs for i in p.images]
    rooms = [
        len(part) * packing.patches * (0 if not n else 1 << int(n - 1).bit_length())
        for part, n in zip(parts, packs, strict=True)
    ]
    return Fill(
        tokens=sum(i.input.tokens for i in items),
        places=sum(packing.rows(one.length) * one.length for one in every),
        patches=sum(images),
        patch_places=sum(rooms),
        squares=sum(i.input.tokens**2 for i in items),
        patch_squares=sum(n * n for n in images),
    )
