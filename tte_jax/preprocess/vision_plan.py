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
    """

    hw: np.ndarray
    segments: np.ndarray
    n: int


def plan_vision(grids: Sequence[Grid], *, merge_size: int, bucket: int | None = None) -> VisionPlan:
    """Plan one packed tower call.

    Args:
      grids: (frames, rows, columns) of each image or video, in packing order.
      merge_size: side of a merge block; patches run block by block, as `patchify` lays them out.
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
    at, segment = 0, 0
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
            at = end
    return VisionPlan(hw=hw, segments=segments, n=total)


def _block_order(rows: int, columns: int, m: int) -> np.ndarray:
    """[rows*columns, 2] coordinates, the m x m patches of one merge block standing together."""
    h, w = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    grid = np.stack([h, w], axis=-1).reshape(rows // m, m, columns // m, m, 2)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
