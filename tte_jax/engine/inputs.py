"""Prompts as padded host arrays, and vision features put where their tokens stand. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tte_jax.engine.packing import PackedBatch, most_sequences
from tte_jax.errors import InternalError, UnsupportedError
from tte_jax.models.config import ModelConfig, WindowedVisionConfig
from tte_jax.preprocess.patches import Grid
from tte_jax.preprocess.positions import mrope_positions, text_positions
from tte_jax.preprocess.template import Prompt


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image's patches [n, C] float32, its grid and the content hash that names its features."""

    key: str
    patches: np.ndarray
    grid: Grid


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One sequence, unpadded.

    Attributes:
      ids: [T] int32.
      positions: [3, T] int32.
      next_pos: position of the token that would follow.
      images: in the order of their tokens.
      is_media: [T] bool, True at vision tokens.
      prefix_ends: as in `Prompt`.
      clipped: of a piece: how many feature rows of its images stand before and behind it.
    """

    ids: np.ndarray
    positions: np.ndarray
    next_pos: int
    images: tuple[ImageInput, ...]
    is_media: np.ndarray
    prefix_ends: tuple[int, ...] = ()
    clipped: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def piece(self, start: int, end: int, *, merged: int) -> ModelInput:
        """Tokens [start, end) at their positions, with the images of which a part stands there.

        Args:
          merged: patches per vision token.

        Raises:
          InternalError: images and vision tokens do not add up.
        """
        rows = [len(image.patches) // merged for image in self.images]
        if sum(rows) != (places := int(self.is_media.sum())):
            raise InternalError(f"{places} vision tokens, but the images make {sum(rows)} features")
        first = int(self.is_media[:start].sum())
        last = first + int(self.is_media[start:end].sum())
        images, clipped, at = [], (0, 0), 0
        for image, count in zip(self.images, rows, strict=True):
            if at < last and first < at + count:
                before = clipped[0] if images else first - at
                clipped = (before, max(at + count - last, 0))
                images.append(image)
            at += count
        return replace(
            self,
            ids=self.ids[start:end],
            positions=self.positions[:, start:end],
            images=tuple(images),
            is_media=self.is_media[start:end],
            prefix_ends=(),
            clipped=clipped,
        )


def model_input(prompt: Prompt, config: ModelConfig, *, start: int = 0) -> ModelInput:
    """A prompt with its positions, beginning at position `start` (behind a shared prefix).

    Raises:
      UnsupportedError: the prompt has images and the model no vision tower.
    """
    ids = np.asarray(prompt.ids, np.int32)
    images = tuple(
        ImageInput(key, patches, grid)
        for key, (patches, grid) in zip(prompt.image_keys, prompt.images, strict=True)
    )
    if config.vision is None or config.image_token_id is None:
        if images:
            raise UnsupportedError(
                f"a {config.model_type} model reads text only, and the input has an image",
                reason="NO_VISION",
            )
        return ModelInput(
            ids,
            text_positions(len(ids), start),
            start + len(ids),
            (),
            np.zeros(len(ids), bool),
            prompt.prefix_ends,
        )
    video = -1 if config.video_token_id is None else config.video_token_id
    intervals = None
    if isinstance(config.vision, WindowedVisionConfig) and prompt.seconds:
        intervals = [config.vision.tokens_per_second * s if s else 1.0 for s in prompt.seconds]
    positions, next_pos = mrope_positions(
        ids,
        [image.grid for image in images],
        image_token_id=config.image_token_id,
        video_token_id=video,
        merge_size=config.vision.merge_size,
        vision_start_token_id=config.vision_start_token_id,
        require_vision_start=prompt.plain_positions,
        intervals=intervals,
    )
    is_media = (ids == config.image_token_id) | (ids == video)
    return ModelInput(
        ids, positions + start, next_pos + start, images, is_media, prompt.prefix_ends
    )


def pad_rows(
    inputs: Sequence[ModelInput], shape: tuple[int, int], *, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded arrays of a bucket.

    Returns:
      ids [B, T] int32, positions [B, 3, T] int32, n [B] int32 (0 for rows without an input).
    """
    rows, tokens = shape
    ids = np.full((rows, tokens), pad_id, np.int32)
    positions = np.zeros((rows, 3, tokens), np.int32)
    n = np.zeros(rows, np.int32)
    for row, one in enumerate(inputs):
        ids[row, : one.tokens] = one.ids
        positions[row, :, : one.tokens] = one.positions
        n[row] = one.tokens
    return ids, positions, n


def pack_rows(
    inputs: Sequence[ModelInput], batch: PackedBatch
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of a bucket whose rows hold several inputs each.

    Returns:
      ids [B, T] int32, positions [B, 3, T] int32, segments [B, T] int32 (from 1; 0 = padding),
      ends [B, J] int32 (the place of each sequence's last token; 0 where there is none).
    """
    rows, tokens = batch.shape
    ids = np.zeros((rows, tokens), np.int32)
    positions = np.zeros((rows, 3, tokens), np.int32)
    segments = np.zeros((rows, tokens), np.int32)
    ends = np.zeros((rows, most_sequences(tokens)), np.int32)
    for place in batch.places:
        one = inputs[place.index]
        part = slice(place.start, place.start + one.tokens)
        ids[place.row, part] = one.ids
        positions[place.row, :, part] = one.positions
        segments[place.row, part] = place.number + 1
        ends[place.row, place.number] = part.stop - 1
    return ids, positions, segments, ends


def place_features(
    inputs: Sequence[ModelInput],
    shape: tuple[int, int],
    features: Mapping[str, np.ndarray],
    *,
    width: int,
    dtype: np.dtype,
    starts: Sequence[tuple[int, int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The feature table and the index into it.

    The table has one row per token of the bucket, and a vision token's feature lies in its own
    row: B*T rows always suffice, so the number of images needs no bucket of its own.

    Args:
      features: [v, D] of each image key.
      starts: (row, first token) of each input; None = each begins a row of its own.

    Returns:
      vis [B*T, D] of `dtype`, vis_idx [B, T] int32 (-1 at text).
    """
    rows, tokens = shape
    vis = np.zeros((rows * tokens, width), dtype)
    vis_idx = np.full((rows, tokens), -1, np.int32)
    for (row, start), one in zip(
        starts or [(i, 0) for i in range(len(inputs))], inputs, strict=True
    ):
        if not one.images:
            continue
        places = start + np.flatnonzero(one.is_media)
        table = np.concatenate([features[image.key] for image in one.images])
        table = table[one.clipped[0] : len(table) - one.clipped[1]]
        if len(table) != len(places):
            raise InternalError(
                f"{len(places)} vision tokens, but the images make {len(table)} features"
            )
        vis[row * tokens + places] = table
        vis_idx[row, places] = row * tokens + places
    return vis, vis_idx
