"""Rotary positions of a sequence: three rows (time, height, width), worked out on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.patches import Grid


def text_positions(length: int, start: int = 0) -> np.ndarray:
    """[3, length] int32: text counts on in all three rows alike."""
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length)).copy()


def mrope_positions(
    ids: np.ndarray | Sequence[int],
    grids: Sequence[Grid],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    vision_start_token_id: int | None = None,
    require_vision_start: bool = False,
    intervals: Sequence[float] | None = None,
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of one unpadded sequence (Qwen2-VL, section 2.1; transformers 5.x).

    Text advances all rows by one per token. An image or video starts where the text before it
    ended and spreads over its own frames, rows and columns of merged patches; the text after it
    goes on `max(rows, columns)` later. A 2 x 3 image between two text tokens:

        token   a  [  image of 2 x 3  ]  b
        time    0   1  1  1  1  1  1     4
        height  0   1  1  1  2  2  2     4
        width   0   1  2  3  1  2  3     4

    Args:
      ids: [T] token ids, placeholders already expanded to one per merged patch.
      grids: (frames, rows, columns) of *unmerged* patches, in order of appearance.
      image_token_id, video_token_id: the placeholders.
      merge_size: side of a merge block.
      vision_start_token_id: used by `require_vision_start` only.
      require_vision_start: transformers 4.52 gave placeholders that do not follow
        `<|vision_start|>` (VLM2Vec's prompts) plain text positions; True reproduces that.
      intervals: time positions from one frame of each grid to the next (Qwen2.5-VL's videos: tokens
        per second x seconds per frame), rounded down after the product; None = 1.

    Returns:
      positions: [3, T] int32.
      next_position: the position, in every row, of the token that follows the sequence. It is where
        a longer sequence would put that token, and where transformers 5.x generates it, although
        the frames of a long video may lie beyond it (its `rope_deltas` say the highest plus one).

    Raises:
      InvalidInputError: placeholders and grids do not add up.
    """
    tokens = np.asarray(ids)
    is_media = (tokens == image_token_id) | (tokens == video_token_id)
    positions = np.empty((3, len(tokens)), np.int32)
    at, now, used = 0, 0, 0
    edges = np.flatnonzero(np.diff(is_media.astype(np.int8))) + 1
    for end in [*edges.tolist(), len(tokens)]:
        opened = at > 0 and tokens[at - 1] == vision_start_token_id
        if at == end:
            continue
        if is_media[at] and not (require_vision_start and not opened):
            while at < end:
                grid = _next_grid(grids, used, end - at, merge_size)
                block = _media_positions(grid, merge_size)
                if intervals is not None:
                    scaled = block[0].astype(np.float32) * np.float32(intervals[used])
                    block[0] = scaled.astype(np.int32)
                block = block + now
                used += 1
                positions[:, at : at + block.shape[1]] = block
                at += block.shape[1]
                now += max(grid[1], grid[2]) // merge_size
        else:
            positions[:, at:end] = text_positions(end - at, now)
            now += end - at
            at = end
    if used != len(grids) and not require_vision_start:
        raise InvalidInputError(
            f"the sequence has placeholders for {used} images, but {len(grids)} came",
            reason="PLACEHOLDER_MISMATCH",
        )
    return positions, now


def media_order(
    ids: np.ndarray, sources: Mapping[int, Iterator[tuple[Grid, float]]], *, merged: int
) -> list[tuple[Grid, float]]:
    """The grids of one sequence in the order of its placeholders, taken from each kind's queue.

    Args:
      ids: [T] token ids, unpadded.
      sources: for each placeholder the grids of all its media in the batch, with their intervals.
      merged: patches per placeholder.

    Raises:
      InvalidInputError: more placeholders than grids.
    """
    tokens = np.asarray(ids)
    found: list[tuple[Grid, float]] = []
    at = 0
    while at < len(tokens):
        source = sources.get(int(tokens[at]))
        if source is None:
            at += 1
            continue
        grid = next(source, None)
        if grid is None:
            raise InvalidInputError(
                f"the sequence has placeholders for more than the {len(found)} images that came",
                reason="PLACEHOLDER_MISMATCH",
            )
        found.append(grid)
        at += max(1, math.prod(grid[0]) // merged)
    return found


def _next_grid(grids: Sequence[Grid], used: int, room: int, merge_size: int) -> Grid:
    if used == len(grids):
        raise InvalidInputError(
            f"the sequence has placeholders for more than the {len(grids)} images that came",
            reason="PLACEHOLDER_MISMATCH",
        )
    grid = grids[used]
    needed = math.prod(grid) // merge_size**2
    if needed > room:
        raise InvalidInputError(
            f"image {used} needs {needed} placeholders (grid {grid}), the sequence has {room}",
            reason="PLACEHOLDER_MISMATCH",
        )
    return grid


def _media_positions(grid: Grid, merge_size: int) -> np.ndarray:
    t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
    return np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")).reshape(
        3, -1
    )
