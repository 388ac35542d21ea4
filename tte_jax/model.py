"""`load_model`: a model of any supported family, on the arrays a Hugging Face processor makes.

The entry for parity checks and for reading a model by hand. Serving goes through
`tte_jax.engine`, which runs the same parameters in fixed shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tte_jax import sharding
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache
from tte_jax.preprocess.patches import Grid
from tte_jax.preprocess.positions import mrope_positions, text_positions
from tte_jax.preprocess.vision_plan import plan_vision
from tte_jax.weights import hf


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gives.

    Attributes:
      logits: [B, T, V] float32 next-token logits.
      last_hidden_state: [B, T, D] hidden states after the final norm, in the model's dtype.
    """

    logits: np.ndarray
    last_hidden_state: np.ndarray


def load_model(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
) -> Model:
    """Load a Hugging Face model directory of a supported family.

    Args:
      path: directory with `config.json` and `*.safetensors`.
      dtype: dtype of the parameters in memory ("float32", "bfloat16", …).
      mesh: of `tte_jax.sharding.make_mesh`; None = the default device.
      rules: how dimensions map to the mesh; None = the defaults.

    Raises:
      NotFoundError, PreconditionError, DataLossError: see `tte_jax.weights.hf.load`.
    """
    placed = None if mesh is None else sharding.sharding_of(mesh, rules)
    return Model(hf.load(path, dtype=jnp.dtype(dtype), sharding_of=placed), mesh, rules)


class Model:
    """Parameters with NumPy in and out; on a mesh, every process gives and gets the whole batch."""

    def __init__(
        self, module: MultimodalLM, mesh: Mesh | None = None, rules: sharding.Rules | None = None
    ) -> None:
        self.module = module
        self.mesh = mesh
        self.rules = rules

    @property
    def config(self) -> ModelConfig:
        return self.module.config

    def __call__(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        **ignored: Any,
    ) -> ModelOutput:
        """One forward pass over a padded batch.

        Args:
          input_ids: [B, T] integer token ids, with one image token per merged patch.
          attention_mask: [B, T], 0 at padding on either side; None = all real.
          pixel_values: [patches, C] float patches of all images, rows of the batch in order.
          image_grid_thw: [images, 3] frames, rows and columns of patches of each image.
          **ignored: other outputs of a processor, such as `mm_token_type_ids`.

        Raises:
          InvalidInputError: shapes that do not belong together; images for a text model.
        """
        del ignored
        inputs = self._prepare(input_ids, attention_mask, pixel_values, image_grid_thw)
        if self.mesh is None:
            logits, hidden, _ = _forward(self.module, *inputs.arrays)
            return ModelOutput(np.asarray(logits), np.asarray(hidden))
        with jax.set_mesh(self.mesh):
            logits, hidden, _ = _forward(self.module, *self._place_batch(inputs.arrays))
            return ModelOutput(np.asarray(_whole(logits)), np.asarray(_whole(hidden)))

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **ignored: Any,
    ) -> np.ndarray:
        """Greedy continuation.

        Args:
          max_new_tokens: hard limit on new tokens.
          eos_token_id: stop tokens; None = the model's own.
          pad_token_id: fills rows that stopped early; None = the model's own, else its first eos.

        Returns:
          [B, T + new] ids: the prompt followed by the continuation.

        Raises:
          UnsupportedError: the model is on a mesh.
        """
        del ignored
        if self.mesh is not None:
            raise UnsupportedError(
                "generate() runs on one device; load the model without a mesh.",
                reason="MESH_UNSUPPORTED",
            )
        if max_new_tokens < 1:
            raise InvalidInputError(
                f"max_new_tokens must be at least 1, got {max_new_tokens}.", field="max_new_tokens"
            )
        ids = np.asarray(input_ids, np.int32)
        inputs = self._prepare(ids, attention_mask, pixel_values, image_grid_thw)
        stops = self._stops(eos_token_id)
        pad = next(p for p in (pad_token_id, self.config.pad_token_id, *stops, 0) if p is not None)
        _, hidden, (k, v) = _forward(self.module, *inputs.arrays)
        # The cache holds the prompt without its padding, so that places are positions again.
        batch, length = ids.shape
        real = inputs.valid.sum(1)
        order = np.argsort(~inputs.valid, axis=1, kind="stable")
        room = length + max_new_tokens
        k, v = (_compact(x, jnp.asarray(order), room) for x in (k, v))
        last = np.array([np.flatnonzero(row)[-1] for row in inputs.valid])
        logits = _head(self.module, hidden[np.arange(batch), last])
        lengths, positions = jnp.asarray(real, jnp.int32), jnp.asarray(inputs.next_position)
        done = np.zeros(batch, bool)
        out: list[np.ndarray] = []
        while True:
            token = np.where(done, pad, np.asarray(logits.argmax(-1))).astype(np.int32)
            out.append(token)
            done |= np.isin(token, stops)
            if done.all() or len(out) == max_new_tokens:
                return np.concatenate([ids, np.stack(out, axis=1)], axis=1)
            logits, k, v = _decode(self.module, k, v, lengths, positions, jnp.asarray(token))
            lengths, positions = lengths + 1, positions + 1

    def _place_batch(self, arrays: tuple[Any, ...]) -> Any:
        """Every array split by its rows; each process puts down only its own devices' part."""
        mesh = self.mesh
        assert mesh is not None

        def put(x: np.ndarray) -> jax.Array:
            spec = sharding.batch_spec(x.shape[0], mesh, self.rules)
            return jax.make_array_from_callback(
                x.shape, NamedSharding(mesh, spec), lambda index: x[index]
            )

        return jax.tree.map(put, arrays)

    def _stops(self, given: int | list[int] | None) -> tuple[int, ...]:
        if given is None:
            return self.config.eos_token_ids
        return (given,) if isinstance(given, int) else tuple(given)

    def _prepare(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        pixel_values: np.ndarray | None,
        image_grid_thw: np.ndarray | None,
    ) -> _Inputs:
        c = self.config
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 2 or not ids.size:
            raise InvalidInputError(
                "input_ids must be [batch, tokens] with at least one token, got shape"
                f" {ids.shape}.",
                field="input_ids",
            )
        if attention_mask is None:
            attention_mask = np.ones(ids.shape, bool)
        valid = np.asarray(attention_mask) > 0
        if valid.shape != ids.shape or not valid.any(1).all():
            raise InvalidInputError(
                f"attention_mask must have the shape of input_ids {ids.shape} and a real token in"
                f" every row, got shape {valid.shape}.",
                field="attention_mask",
            )
        if (pixel_values is None) != (image_grid_thw is None):
            raise InvalidInputError(
                "pixel_values and image_grid_thw belong together; only one of them was given.",
                field="pixel_values" if pixel_values is None else "image_grid_thw",
            )
        positions = np.zeros((ids.shape[0], 3, ids.shape[1]), np.int32)
        after = np.zeros(ids.shape[0], np.int32)
        vis_idx = np.full(ids.shape, -1, np.int32)
        pack = None
        if pixel_values is not None and image_grid_thw is not None:
            pack = self._pack(pixel_values, image_grid_thw)
            self._place(ids, valid, np.asarray(image_grid_thw), vis_idx)
        grids = [] if image_grid_thw is None else _grids(image_grid_thw)
        for row, real in enumerate(valid):
            tokens = ids[row, real]
            if c.vision is None:
                rows, after[row] = text_positions(len(tokens)), len(tokens)
            else:
                assert c.image_token_id is not None and c.video_token_id is not None
                merged = c.vision.merged
                mine, tokens_left = 0, int((tokens == c.image_token_id).sum())
                while tokens_left > 0 and mine < len(grids):
                    tokens_left -= int(np.prod(grids[mine])) // merged
                    mine += 1
                rows, after[row] = mrope_positions(
                    tokens,
                    grids[:mine],
                    image_token_id=c.image_token_id,
                    video_token_id=c.video_token_id,
                    merge_size=c.vision.merge_size,
                )
                grids = grids[mine:]
            positions[row][:, real] = rows
        return _Inputs(ids, valid, positions, after, vis_idx, pack)

    def _pack(self, pixel_values: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, ...]:
        vision = self.config.vision
        if vision is None:
            raise InvalidInputError(
                f"A {self.config.model_type} model reads text only, but pixel_values were given.",
                field="pixel_values",
            )
        patches = np.asarray(pixel_values, np.float32)
        needed = int(np.prod(np.asarray(grids), axis=1).sum())
        if patches.shape != (needed, vision.patch_values):
            raise InvalidInputError(
                f"image_grid_thw asks for pixel_values of shape {(needed, vision.patch_values)},"
                f" got {patches.shape}.",
                field="pixel_values",
            )
        plan = plan_vision(_grids(grids), merge_size=vision.merge_size, bucket=None)
        return patches[None], plan.hw[None], plan.segments[None]

    def _place(
        self, ids: np.ndarray, valid: np.ndarray, grids: np.ndarray, vis_idx: np.ndarray
    ) -> None:
        """Number the image tokens of the batch in order, row by row."""
        assert self.config.vision is not None
        where = (ids == self.config.image_token_id) & valid
        features = int(np.prod(grids, axis=1).sum()) // self.config.vision.merged
        if where.sum() != features:
            raise InvalidInputError(
                f"input_ids hold {int(where.sum())} image tokens, but the images make {features}.",
                field="input_ids",
            )
        vis_idx[where] = np.arange(features)


@dataclass(frozen=True)
class _Inputs:
    """A prepared batch: see `_forward` for the arrays; next_position [B] continues the rotary."""

    ids: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    next_position: np.ndarray
    vis_idx: np.ndarray
    pack: tuple[np.ndarray, ...] | None

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.ids, self.valid, self.positions, self.vis_idx, self.pack


def _grids(rows: np.ndarray) -> list[Grid]:
    return [(int(t), int(h), int(w)) for t, h, w in rows]


@jax.jit
def _forward(
    module: MultimodalLM,
    ids: jax.Array,
    valid: jax.Array,
    positions: jax.Array,
    vis_idx: jax.Array,
    pack: tuple[jax.Array, ...] | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    vis = None if pack is None else module.encode_images(*pack)
    hidden, kv = module.forward(ids, valid=valid, positions=positions, vis=vis, vis_idx=vis_idx)
    return module.logits(hidden), hidden, kv


@jax.jit
def _whole(x: jax.Array) -> jax.Array:
    """On every device of the mesh, so that any process can read it."""
    return jax.sharding.reshard(x, PartitionSpec())


@jax.jit
def _head(module: MultimodalLM, hidden: jax.Array) -> jax.Array:
    return module.logits(hidden)


def _compact(x: jax.Array, order: jax.Array, room: int) -> jax.Array:
    """[L B T K H] → [L B room K H], each row's real places first."""
    x = jnp.take_along_axis(x, order[None, :, :, None, None], axis=2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0), (0, 0)))


@jax.jit(donate_argnums=(1, 2))
def _decode(
    module: MultimodalLM,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    positions: jax.Array,
    token: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = token.shape[0]
    hidden, (new_k, new_v) = module.forward(
        token[:, None],
        valid=jnp.ones((batch, 1), bool),
        positions=jnp.broadcast_to(positions[:, None, None], (batch, 3, 1)),
        prefix=KVCache(k=k, v=v, length=lengths),
    )
    rows = jnp.arange(batch)
    k = k.at[:, rows, lengths].set(new_k[:, :, 0])
    v = v.at[:, rows, lengths].set(new_v[:, :, 0])
    return module.logits(hidden[:, 0]), k, v
