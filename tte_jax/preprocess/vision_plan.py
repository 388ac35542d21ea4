"""What the vision tower must know of the images' sizes, worked out on the host.

Every array here has a length that is a bucket's, so the compiled tower never sees a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.patches import Grid


@dataclass(frozen=True)
class VisionPlan:
    """Coordinates and attention segments of packed patches.

    Attributes:
      hw: [P, 2] int32, row and column of each patch in its frame (0 at pads).
      segments: [P] int32, 1 for the patches of the first frame, 2 for the second, ...; 0 = pad.
        A patch attends to the patches of its own segment only.
      n: how many of the P patches are real; they come first.
      windows: [P] int32, as `segments`, but a number per attention window (Qwen2.5-VL).
      taps: [P, 4] int32, rows of the learned position table around each patch (Qwen3-VL).
      tap_weights: [P, 4] float32, their bilinear weights; 0 at pads.
    """

    hw: np.ndarray
    segments: np.ndarray
    n: int
    windows: np.ndarray | None = None
    taps: np.ndarray | None = None
    tap_weights: np.ndarray | None = None

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the tower takes after the patches, in its order."""
        known = (self.hw, self.segments, self.windows, self.taps, self.tap_weights)
        return tuple(x for x in known if x is not None)


def plan_vision(
    grids: Sequence[Grid],
    *,
    merge_size: int,
    window: int | None = None,
    table_side: int | None = None,
    bucket: int | None = None,
) -> VisionPlan:
    """Plan one packed tower call.

    Args:
      grids: (frames, rows, columns) of each image or video, in packing order.
      merge_size: side of a merge block; patches run block by block, as `patchify` lays them out.
      window: side of an attention window, patches (a multiple of `merge_size`); None = no windows.
      table_side: rows and columns of the position table; None = no table.
      bucket: P, the padded number of patches; `None` = exactly as many as there are.

    Raises:
      InvalidInputError: the patches do not fit the bucket, or a grid is not made of whole blocks.
    """
    total = sum(math.prod(grid) for grid in grids)
    size = total if bucket is None else bucket
    if total > size:
        raise InvalidInputError(
            f"{len(grids)} images make {total} patches, at most {size} fit; send fewer or smaller "
            "images",
            reason="TOO_MANY_PATCHES",
            patches=total,
            limit=size,
        )
    hw = np.zeros((size, 2), np.int32)
    segments = np.zeros(size, np.int32)
    windows = None if window is None else np.zeros(size, np.int32)
    taps = None if table_side is None else np.zeros((size, 4), np.int32)
    tap_weights = None if table_side is None else np.zeros((size, 4), np.float32)
    at, segment, first_window = 0, 0, 1
    for frames, rows, columns in grids:
        if rows % merge_size or columns % merge_size:
            raise InvalidInputError(
                f"a grid of {rows} x {columns} patches cannot be merged in blocks of "
                f"{merge_size} x {merge_size}",
                reason="BAD_GRID",
            )
        coordinates = _block_order(rows, columns, merge_size)
        for _ in range(frames):
            segment += 1
            end = at + rows * columns
            hw[at:end] = coordinates
            segments[at:end] = segment
            if window is not None and windows is not None:
                down, across = (coordinates // window).T
                wide = -(-columns // window)
                windows[at:end] = first_window + down * wide + across
                first_window += -(-rows // window) * wide
            if table_side is not None and taps is not None and tap_weights is not None:
                taps[at:end], tap_weights[at:end] = _taps(coordinates, rows, columns, table_side)
            at = end
    return VisionPlan(
        hw=hw,
        segments=segments,
        n=total,
        windows=windows,
        taps=taps,
        tap_weights=tap_weights,
    )


def _taps(
    coordinates: np.ndarray, rows: int, columns: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The table's corners stand on the frame's corners; between them it is read bilinearly."""
    near, weight = [], []
    for axis, length in enumerate((rows, columns)):
        # In float32, and in this order, as the reference does.
        source = coordinates[:, axis].astype(np.float32) * np.float32(side - 1)
        source = source / np.float32(max(length - 1, 1))
        low = np.floor(source)
        far = source - low
        taps = low.astype(np.int32)[:, None] + np.arange(2, dtype=np.int32)
        near.append(np.minimum(taps, side - 1))
        weight.append(np.stack([1 - far, far], axis=1))
    index = near[0][:, :, None] * side + near[1][:, None, :]
    return index.reshape(-1, 4), (weight[0][:, :, None] * weight[1][:, None, :]).reshape(-1, 4)


def _block_order(rows: int, columns: int, m: int) -> np.ndarray:
    """[rows*columns, 2] coordinates, the m x m patches of one merge block standing together."""
    h, w = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    grid = np.stack([h, w], axis=-1).reshape(rows // m, m, columns // m, m, 2)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
