"""Which frames of a video a model sees, and how large: the rules of the published processors.

There are two families of rules. Qwen2-VL and Qwen2.5-VL take every n-th frame and bound the area of
*one frame*; Qwen3-VL spreads its frames from the first to the last and bounds the area of *all*
frames together, and its prompt names the time of every frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.models.files import read_json
from tte_jax.preprocess.patches import (
    CLIP_MEAN,
    CLIP_STD,
    check_steps,
    nested,
    per_channel,
    smart_resize,
)

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VideoConfig:
    """How a video becomes patches.

    Attributes:
      patch_size, temporal_patch_size, merge_size, mean, std: as of `ImageConfig`.
      min_pixels, max_pixels: bounds of the area after resizing; of one frame, or with
        `whole_video` of all frames together.
      fps: frames to sample per second of video.
      min_frames, max_frames: bounds of how many are sampled; a shorter video gives all it has.
      whole_video: the rules of Qwen3-VL instead of those of Qwen2-VL.
      video_tokens: Qwen2-VL: the context that one video may take, in merged patches, of which 90 %
        are shared out evenly over the frames. Qwen3-VL: the most merged patches of one frame.
      max_patches: the most patches that a video may make, 0 = no bound. Frames become smaller,
        then fewer, until it holds. Ours: what is served has buckets of fixed size.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    whole_video: bool = False
    video_tokens: int = 128_000
    max_patches: int = 0

    @classmethod
    def qwen3_vl(cls) -> VideoConfig:
        """The defaults of the Qwen3-VL processor."""
        return cls(
            patch_size=16,
            min_pixels=128 * 32 * 32,
            max_pixels=768 * 32 * 32,
            mean=HALF,
            std=HALF,
            whole_video=True,
            video_tokens=768,
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> VideoConfig | None:
        """Read the directory's video processor, or its image processor where there is no other.

        In this order: `video_preprocessor_config.json`, `video_processor` of
        `processor_config.json`, `preprocessor_config.json`; that is also the reference's order.
        `video` of `tte.json` changes single values, such as `{"video": {"fps": 1.0}}`.

        Returns:
          None when the directory has none of them: a text model.

        Raises:
          PreconditionError: a file is not a JSON object.
          UnsupportedError: the file asks for steps that these models' processors do not have.
        """
        path = Path(path)
        raw = _processor(path)
        if raw is None:
            return None
        check_steps(raw, str(path))
        kind = f"{raw.get('video_processor_type', '')} {raw.get('processor_class', '')}"
        newer = "Qwen3VL" in kind or "qwen3" in str(_json(path / "config.json").get("model_type"))
        base = cls.qwen3_vl() if newer else cls()
        size = nested(raw, "size", path)
        low = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        high = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        known = ("patch_size", "temporal_patch_size", "merge_size", "min_frames", "max_frames")
        found: dict[str, Any] = {k: raw[k] for k in (*known, "fps") if raw.get(k)}
        if raw.get("max_video_tokens"):
            found["video_tokens"] = raw["max_video_tokens"]
        ours = nested(_json(path / "tte.json"), "video", path)
        return replace(
            base,
            **{
                "min_pixels": low or base.min_pixels,
                "max_pixels": high or base.max_pixels,
                "mean": per_channel(raw, "image_mean", base.mean),
                "std": per_channel(raw, "image_std", base.std),
                **found,
                **ours,
            },
        )

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: channels x frames x patch x patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def sample(self, frames: int, fps: float) -> np.ndarray:
        """[n] int64: which of `frames` frames at `fps` per second are seen, in order."""
        tp = self.temporal_patch_size
        most = self.max_frames
        if self.max_patches:
            most = min(most, max(1, self.max_patches // (4 * self.merge_size**2)) * tp)
        if self.whole_video:
            count = min(max(int(frames / fps * self.fps), self.min_frames), most, frames)
            return np.linspace(0, frames - 1, count).round().astype(np.int64)
        limit = math.floor(min(most, frames) / tp) * tp
        wanted = min(max(frames / fps * self.fps, self.min_frames), limit, frames)
        count = math.floor(wanted / tp) * tp
        if count == 0:  # fewer frames than one patch takes; the reference divides by zero here
            return np.arange(frames)
        step = frames / count
        # The reference counts in float32, which decides which way a whole number falls.
        return (np.arange(math.ceil(frames / step)) * step).astype(np.float32).astype(np.int64)

    def size(self, frames: int, height: int, width: int, *, field: str = "") -> tuple[int, int]:
        """(height, width) to which each of the sampled frames is resized.

        Raises:
          InvalidInputError: one side is more than 200 times the other.
        """
        low, high, factor = self.min_pixels, self.max_pixels, self.patch_size * self.merge_size
        tp = self.temporal_patch_size
        frames = max(frames, tp)
        if self.whole_video:
            share = min(self.video_tokens * factor**2, high // frames)
            high = max(share, int(low * 1.05)) * frames
            new = self._whole(frames, height, width, low, high, field=field)
        else:
            total = int(self.video_tokens * factor * factor * 0.9)
            high = max(min(high, total * tp // frames), int(low * 1.05))
            new = smart_resize(height, width, factor, low, high, field=field)
        slices = math.ceil(frames / tp)
        room = self.max_patches * self.patch_size**2 // slices
        high = room
        # A side is never below one block, so that long, narrow frames need more than one step.
        while self.max_patches and new[0] * new[1] > room and new != (factor, factor):
            new = smart_resize(height, width, factor, 1, high, field=field)
            high = int(high * 0.8)
        return new

    def _whole(
        self, frames: int, height: int, width: int, low: int, high: int, *, field: str
    ) -> tuple[int, int]:
        factor, tp = self.patch_size * self.merge_size, self.temporal_patch_size
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        # Only for the check of the sides; its own bounds are those of a single frame.
        smart_resize(height, width, factor, 1, height * width + factor**2, field=field)
        whole = round(frames / tp) * tp
        new = [round(side / factor) * factor for side in (height, width)]
        if whole * new[0] * new[1] > high:
            shrink = math.sqrt((frames * height * width) / high)
            new = [max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width)]
        elif whole * new[0] * new[1] < low:
            grow = math.sqrt(low / (frames * height * width))
            new = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return new[0], new[1]

    def times(self, indices: np.ndarray, fps: float) -> tuple[float, ...]:
        """Seconds into the video of every temporal patch: the middle of its first and last frame.

        A last patch that is not full counts its last frame again.
        """
        tp = self.temporal_patch_size
        full = [*indices.tolist(), *[int(indices[-1])] * (-len(indices) % tp)]
        return tuple((full[i] / fps + full[i + tp - 1] / fps) / 2 for i in range(0, len(full), tp))

    def seconds_per_patch(self, count: int, frames: int, fps: float) -> float:
        """Seconds between temporal patches, for positions in absolute time (Qwen2.5-VL)."""
        return self.temporal_patch_size / (count / frames * fps)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _processor(path: Path) -> dict[str, Any] | None:
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if name == "preprocessor_config.json":
            file = path / "processor_config.json"
            if found := nested(_json(file), "video_processor", file):
                return found
        if (path / name).is_file():
            return _json(path / name)
    both = _json(path / "processor_config.json")
    return nested(both, "image_processor", path) if "image_processor" in both else None
