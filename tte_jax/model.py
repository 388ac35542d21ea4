"""`load_model`: a model of any supported family, on the arrays a Hugging Face processor makes.

The entry for parity checks and for reading a model by hand. Serving goes through
`tte_jax.engine`, which runs the same parameters in fixed shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tte_jax import sharding
from tte_jax.errors import InvalidInputError
from tte_jax.models.config import DeepStackVisionConfig, ModelConfig, WindowedVisionConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.text import KVCache
from tte_jax.nn.linear import explicit_spec, gathered
from tte_jax.preprocess.patches import Grid
from tte_jax.preprocess.positions import media_order, mrope_positions, text_positions
from tte_jax.preprocess.vision_plan import plan_vision
from tte_jax.weights import source

MropeMode = Literal["current", "legacy"]


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
    mrope_mode: MropeMode = "current",
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    quantise: Literal["int8"] | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Load a Hugging Face model directory of a supported family.

    Args:
      path: directory with `config.json` and `*.safetensors`; or a PEFT adapter's directory, whose
        base is then loaded and changed.
      dtype: dtype of the parameters in memory ("float32", "bfloat16", …).
      mrope_mode: "legacy" gives vision tokens that do not follow `<|vision_start|>` plain text
        positions, as transformers 4.52 did: models trained with it on such prompts need it.
      mesh: of `tte_jax.sharding.make_mesh`; None = the default device.
      rules: how dimensions map to the mesh; None = the defaults.
      quantise: "int8" holds the matrices of linear layers as int8, a quarter of float32.
      adapter: a PEFT adapter (LoRA or DoRA) to merge into the model at `path`.

    Raises:
      InvalidInputError: an unknown `mrope_mode` or `quantise`.
      NotFoundError, PreconditionError, DataLossError: see `tte_jax.weights.source.load`.
    """
    if mrope_mode not in ("current", "legacy"):
        raise InvalidInputError(
            f"mrope_mode must be 'current' or 'legacy', got {mrope_mode!r}.", field="mrope_mode"
        )
    placed = None if mesh is None else sharding.sharding_of(mesh, rules)
    module = source.load(
        path, adapter=adapter, dtype=jnp.dtype(dtype), sharding_of=placed, quantise=quantise
    )
    return Model(module, mrope_mode=mrope_mode, mesh=mesh, rules=rules)


class Model:
    """Parameters with NumPy in and out; on a mesh, every process gives and gets the whole batch."""

    def __init__(
        self,
        module: MultimodalLM,
        *,
        mrope_mode: MropeMode = "current",
        mesh: Mesh | None = None,
        rules: sharding.Rules | None = None,
    ) -> None:
        self.module = module
        self.mrope_mode = mrope_mode
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
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        second_per_grid_ts: np.ndarray | None = None,
        **ignored: Any,
    ) -> ModelOutput:
        """One forward pass over a padded batch.

        Args:
          input_ids: [B, T] integer token ids, with one image token per merged patch.
          attention_mask: [B, T], 0 at padding on either side; None = all real.
          pixel_values: [patches, C] float patches of all images, rows of the batch in order.
          image_grid_thw: [images, 3] frames, rows and columns of patches of each image.
          pixel_values_videos, video_grid_thw: likewise of all videos.
          second_per_grid_ts: [videos] seconds from one frame of a grid to the next (Qwen2.5-VL).
          **ignored: other outputs of a processor, such as `mm_token_type_ids`.

        Raises:
          InvalidInputError: shapes that do not belong together; images for a text model.
        """
        del ignored
        inputs = self._prepare(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
        )
        with self._on_mesh():
            logits, hidden, _ = _forward(self.module, *self._place_batch(inputs.arrays))
            if self.mesh is not None:
                logits, hidden = _whole(logits), _whole(hidden)
            return ModelOutput(np.asarray(logits), np.asarray(hidden))

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        second_per_grid_ts: np.ndarray | None = None,
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
          [B, T + new] ids: the prompt followed by the continuation. On a mesh the prompts are read
          in parts of the batch; then every device decodes all rows, with its part of the heads.
        """
        del ignored
        if max_new_tokens < 1:
            raise InvalidInputError(
                f"max_new_tokens must be at least 1, got {max_new_tokens}.", field="max_new_tokens"
            )
        ids = np.asarray(input_ids, np.int32)
        inputs = self._prepare(
            ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
        )
        stops = self._stops(eos_token_id)
        pad = next(p for p in (pad_token_id, self.config.pad_token_id, *stops, 0) if p is not None)
        batch, length = ids.shape
        # The cache holds the prompt without its padding, so that places are positions again.
        order = np.argsort(~inputs.valid, axis=1, kind="stable").astype(np.int32)
        last = np.array([np.flatnonzero(row)[-1] for row in inputs.valid], np.int32)
        done = np.zeros(batch, bool)
        out: list[np.ndarray] = []
        with self._on_mesh():
            _, hidden, (k, v) = _forward(self.module, *self._place_batch(inputs.arrays))
            lengths, positions, order, last = self._place_whole(
                (inputs.valid.sum(1, dtype=np.int32), inputs.next_position, order, last)
            )
            best = _head(self.module, hidden, last)
            k, v = (_compact(x, order, room=length + max_new_tokens) for x in (k, v))
            while True:
                token = np.where(done, pad, np.asarray(best)).astype(np.int32)
                out.append(token)
                done |= np.isin(token, stops)
                if done.all() or len(out) == max_new_tokens:
                    return np.concatenate([ids, np.stack(out, axis=1)], axis=1)
                token = self._place_whole(token)
                best, k, v, lengths, positions = _decode(
                    self.module, k, v, lengths, positions, token
                )

    def _on_mesh(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _place_batch(self, arrays: tuple[Any, ...]) -> Any:
        """Every array split by its rows; each process puts down only its own devices' part."""
        return self._put(arrays, lambda x, mesh: sharding.batch_spec(len(x), mesh, self.rules))

    def _place_whole(self, arrays: Any) -> Any:
        """Every array on all devices."""
        return self._put(arrays, lambda x, mesh: PartitionSpec())

    def _put(self, arrays: Any, spec: Callable[[np.ndarray, Mesh], PartitionSpec]) -> Any:
        mesh = self.mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, arrays)

        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                x.shape, NamedSharding(mesh, spec(x, mesh)), lambda index: x[index]
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
        pixel_values_videos: np.ndarray | None,
        video_grid_thw: np.ndarray | None,
        second_per_grid_ts: np.ndarray | None,
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
        media = [
            self._media("image", pixel_values, image_grid_thw),
            self._media("video", pixel_values_videos, video_grid_thw),
        ]
        positions = np.zeros((ids.shape[0], 3, ids.shape[1]), np.int32)
        after = np.zeros(ids.shape[0], np.int32)
        vis_idx = np.full(ids.shape, -1, np.int32)
        if c.vision is None:
            for row, real in enumerate(valid):
                n = int(real.sum())
                positions[row][:, real], after[row] = text_positions(n), n
            return _Inputs(ids, valid, positions, after, vis_idx, None)
        assert c.image_token_id is not None and c.video_token_id is not None
        self._place(ids, valid, media, vis_idx)
        sources = {
            c.image_token_id: iter((grid, 1.0) for grid in media[0].grids),
            c.video_token_id: iter(_video_frames(c, media[1].grids, second_per_grid_ts)),
        }
        for row, real in enumerate(valid):
            tokens = ids[row, real]
            mine = media_order(tokens, sources, merged=c.vision.merged)
            rows, after[row] = mrope_positions(
                tokens,
                [grid for grid, _ in mine],
                image_token_id=c.image_token_id,
                video_token_id=c.video_token_id,
                merge_size=c.vision.merge_size,
                vision_start_token_id=c.vision_start_token_id,
                require_vision_start=self.mrope_mode == "legacy",
                intervals=[interval for _, interval in mine],
            )
            positions[row][:, real] = rows
        grids = [*media[0].grids, *media[1].grids]
        if not grids:
            return _Inputs(ids, valid, positions, after, vis_idx, None)
        patches = np.concatenate([m.patches for m in media if m.patches is not None])
        plan = plan_vision(grids, **c.vision.plan)
        pack = (patches[None], *(x[None] for x in plan.arrays))
        return _Inputs(ids, valid, positions, after, vis_idx, pack)

    def _media(self, kind: str, patches: np.ndarray | None, thw: np.ndarray | None) -> _Media:
        """Checks the patches of all images, or of all videos, against their grids."""
        pixels, name = _ARGUMENTS[kind]
        if (patches is None) != (thw is None):
            raise InvalidInputError(
                f"{pixels} and {name} belong together; only one of them was given.",
                field=pixels if patches is None else name,
            )
        if patches is None or thw is None:
            return _Media(kind, [], None)
        vision = self.config.vision
        if vision is None:
            raise InvalidInputError(
                f"A {self.config.model_type} model reads text only, but {pixels} were given.",
                field=pixels,
            )
        patches = np.asarray(patches, np.float32)
        needed = int(np.prod(np.asarray(thw), axis=1).sum())
        if patches.shape != (needed, vision.patch_values):
            raise InvalidInputError(
                f"{name} asks for {pixels} of shape {(needed, vision.patch_values)},"
                f" got {patches.shape}.",
                field=pixels,
            )
        return _Media(kind, [(int(t), int(h), int(w)) for t, h, w in thw], patches)

    def _place(
        self, ids: np.ndarray, valid: np.ndarray, media: list[_Media], vis_idx: np.ndarray
    ) -> None:
        """Number the vision tokens in the order of the pack: all images, then all videos."""
        c, first = self.config, 0
        assert c.vision is not None
        for one, token in zip(media, (c.image_token_id, c.video_token_id), strict=True):
            where = (ids == token) & valid
            features = sum(math.prod(grid) for grid in one.grids) // c.vision.merged
            if where.sum() != features:
                raise InvalidInputError(
                    f"input_ids hold {int(where.sum())} {one.kind} tokens (placeholders), but the"
                    f" {one.kind}s make {features}.",
                    field="input_ids",
                )
            vis_idx[where] = first + np.arange(features)
            first += features


_ARGUMENTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def _video_frames(
    config: ModelConfig, grids: list[Grid], seconds: np.ndarray | None
) -> list[tuple[Grid, float]]:
    """The grids as they stand in the sequence, each with its time positions per frame."""
    if seconds is not None and len(seconds) != len(grids):
        raise InvalidInputError(
            f"second_per_grid_ts has {len(seconds)} numbers for {len(grids)} videos.",
            field="second_per_grid_ts",
        )
    if isinstance(config.vision, DeepStackVisionConfig):
        # Each frame stands by itself behind its time in words.
        return [((1, h, w), 1.0) for t, h, w in grids for _ in range(t)]
    if isinstance(config.vision, WindowedVisionConfig):
        each = [1.0] * len(grids) if seconds is None else [float(s) for s in seconds]
        speed = config.vision.tokens_per_second
        return [(grid, speed * s) for grid, s in zip(grids, each, strict=True)]
    return [(grid, 1.0) for grid in grids]


@dataclass(frozen=True)
class _Media:
    """All images, or all videos, of a batch."""

    kind: str
    grids: list[Grid]
    patches: np.ndarray | None


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
    return gathered(x)


@jax.jit
def _head(module: MultimodalLM, hidden: jax.Array, last: jax.Array) -> jax.Array:
    """The best next token at place `last` of each row."""
    hidden = gathered(hidden)
    return gathered(module.logits(hidden[jnp.arange(len(last)), last])).argmax(-1)


@partial(jax.jit, static_argnames="room")
def _compact(x: jax.Array, order: jax.Array, *, room: int) -> jax.Array:
    """[L B T K H] → [L B room K H], each row's real places first; all rows on every device."""
    if (split := explicit_spec(x)) is not None:
        x = jax.sharding.reshard(x, PartitionSpec(None, None, None, split[3], None))
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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads `token`; the next one of each row, and the cache with its new lengths and positions."""
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
    best = gathered(module.logits(hidden[:, 0])).argmax(-1)
    return best, k, v, lengths + 1, positions + 1
