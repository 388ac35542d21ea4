"""RGB image to flattened patches, bit for bit as the reference's PIL processor does.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL share that processor; they differ in the values of their files
(Qwen3-VL: patches of 16, mean and deviation 0.5, other limits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError, UnsupportedError
from tte_jax.models.files import read_json

Grid = tuple[int, int, int]
"""(frames, rows, columns) of *unmerged* patches."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes patches.

    Attributes:
      patch_size: side of a patch, pixels.
      temporal_patch_size: frames per patch; a still image is repeated to fill it.
      merge_size: side of the block of patches that the vision tower merges to one token.
      min_pixels: smallest area after resizing.
      max_pixels: largest area after resizing.
      mean: per channel, of values in [0, 1].
      std: per channel.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def from_dir(cls, path: str | Path) -> ImageConfig:
        """Read `preprocessor_config.json`, or the image part of a newer `processor_config.json`.

        Both ways to state the area are understood: `min_pixels` / `max_pixels` and
        `size = {shortest_edge, longest_edge}`; where a file has both, the former counts, as in
        the reference.

        Raises:
          NotFoundError: neither file exists.
          PreconditionError: the file is not a JSON object.
          UnsupportedError: the file asks for steps that these models' processors do not have.
        """
        old, new = Path(path) / "preprocessor_config.json", Path(path) / "processor_config.json"
        if old.is_file():
            raw = read_json(old)
        elif new.is_file():
            raw = nested(read_json(new), "image_processor", new)
        else:
            raise NotFoundError(
                f"{path} has no preprocessor_config.json; a model that reads images needs one "
                "(save the processor beside the weights)",
                reason="PROCESSOR_NOT_FOUND",
            )
        check_steps(raw, str(path))
        size = nested(raw, "size", path)
        low = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        high = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        return cls(
            patch_size=raw.get("patch_size", cls.patch_size),
            temporal_patch_size=raw.get("temporal_patch_size", cls.temporal_patch_size),
            merge_size=raw.get("merge_size", cls.merge_size),
            min_pixels=low or cls.min_pixels,
            max_pixels=high or cls.max_pixels,
            mean=per_channel(raw, "image_mean", cls.mean),
            std=per_channel(raw, "image_std", cls.std),
        )

    def at_most(self, patches: int) -> ImageConfig:
        """These limits, lowered where an image could make more than `patches` patches."""
        most = patches * self.patch_size**2
        if self.max_pixels <= most:
            return self
        # Sides are rounded up when an image grows, so the smallest area keeps well below.
        return replace(self, max_pixels=most, min_pixels=min(self.min_pixels, most // 4))

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: channels x frames x patch x patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def tokens(self, grid: Grid) -> int:
        """How many tokens (merged patches) an image of this grid takes in the sequence."""
        return math.prod(grid) // self.merge_size**2


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, field: str = ""
) -> tuple[int, int]:
    """The size to which an image is resized: (height, width), both multiples of `factor`.

    The area comes to lie within [min_pixels, max_pixels] and the aspect ratio is kept as well as
    multiples allow. Python's rounding (half to even) is part of the contract.

    Raises:
      InvalidInputError: one side is more than 200 times the other (`ASPECT_RATIO`).
    """
    if max(height, width) > 200 * min(height, width):
        raise InvalidInputError(
            f"an image of {width} x {height} pixels is too elongated: one side may be at most "
            "200 times the other; crop it",
            field=field,
            reason="ASPECT_RATIO",
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify(
    image: Image.Image, config: ImageConfig, *, field: str = ""
) -> tuple[np.ndarray, Grid]:
    """Resize, normalise and cut one RGB image.

    Returns:
      patches: [n, C*Tp*p*p] float32; rows in merge-block order (the `merge_size` x `merge_size`
        patches of one token stand together), columns channel, frame, row, column.
      grid: (1, rows, columns) of patches, n = rows * columns.

    Raises:
      InvalidInputError: the image is more than 200 times as long as wide.
    """
    p, m, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    width, height = image.size
    new_height, new_width = smart_resize(
        height, width, p * m, config.min_pixels, config.max_pixels, field=field
    )
    resized = image.convert("RGB").resize((new_width, new_height), Image.Resampling.BICUBIC)
    table = _normalised_levels(config.mean, config.std)
    rows, columns = new_height // p, new_width // p
    blocks = cut_blocks(np.asarray(resized), p, m)
    # Cut the bytes first, then look each channel up: four times less memory to move around.
    patches = np.empty((*blocks.shape[:5], frames, p, p), np.float32)
    for channel in range(3):
        patches[:, :, :, :, channel] = table[channel][blocks[:, :, :, :, channel]][..., None, :, :]
    return patches.reshape(rows * columns, config.patch_dim), (1, rows, columns)


def cut_blocks(pixels: np.ndarray, p: int, m: int) -> np.ndarray:
    """[H, W, C] to [H/pm, W/pm, m, m, C, p, p], a view: merge blocks of patches."""
    height, width, channels = pixels.shape
    cut = pixels.transpose(2, 0, 1).reshape(
        channels, height // (p * m), m, p, width // (p * m), m, p
    )
    return cut.transpose(1, 4, 2, 5, 0, 3, 6)


@lru_cache(maxsize=8)
def _normalised_levels(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """[3, 256] float32: what each 8-bit level becomes, in the reference's order of roundings."""
    level = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    m, s = np.array(mean, np.float32), np.array(std, np.float32)
    return (level[None] - m[:, None]) / s[:, None]


def nested(raw: dict[str, Any], key: str, where: str | Path) -> dict[str, Any]:
    """The object at `key` of a processor's file, empty where there is none.

    Raises:
      PreconditionError: it is no object.
    """
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise PreconditionError(
            f"{key} of the image processor of {where} is {found!r}, expected an object",
            reason="BAD_MODEL_FILE",
        )
    return found


def per_channel(
    raw: dict[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Three values of a processor's file.

    Raises:
      UnsupportedError: there are not three.
    """
    values = raw.get(key) or default
    if len(values) != 3:
        raise UnsupportedError(
            f"{key} has {len(values)} values, expected 3 (RGB)", reason="UNSUPPORTED_PROCESSOR"
        )
    return float(values[0]), float(values[1]), float(values[2])


def check_steps(raw: dict[str, Any], path: str) -> None:
    """Refuses a processor's file with other steps than resize, rescale and normalise.

    Raises:
      UnsupportedError: names every value that differs.
    """
    expected = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": int(Image.Resampling.BICUBIC),
    }
    wrong = [f"{k} = {raw[k]}" for k, v in expected.items() if raw.get(k, v) not in (v, None)]
    if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        wrong.append(f"rescale_factor = {raw['rescale_factor']}")
    if wrong:
        raise UnsupportedError(
            f"the image processor of {path} has {', '.join(wrong)}; supported is {expected} with "
            "rescale_factor 1/255",
            reason="UNSUPPORTED_PROCESSOR",
        )
