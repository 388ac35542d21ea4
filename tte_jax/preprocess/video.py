"""A video file to patches, decoded frame by frame so that a long one needs no more memory.

Memory: the result (12 bytes per pixel of the resized sampled frames, see `video_bytes`), the file
itself and a few decoded frames; never all frames of the video.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from tte_jax.errors import InvalidInputError
from tte_jax.limits import MAX_IMAGE_PIXELS, MAX_VIDEO_FRAMES
from tte_jax.preprocess.patches import Grid, cut_blocks
from tte_jax.preprocess.video_config import VideoConfig

# Demuxers that read nothing but the bytes they are given. Others (playlists, concatenations, image
# sequences) open further files or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,gif"

# Containers may count frames that are never shown (edit lists, open groups at the end).
_TOLERATED_LOSS = 0.05


@dataclass(frozen=True)
class VideoInfo:
    """What the file says of itself: number of frames, frames per second, size in pixels."""

    frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class VideoPatches:
    """A prepared video.

    Attributes:
      patches: [n, C*Tp*p*p] float32, temporal patch by temporal patch, each in merge-block order.
      grid: (temporal patches, rows, columns), n = their product.
      times: seconds into the video of each temporal patch.
      seconds_per_patch: seconds between two temporal patches.
    """

    patches: np.ndarray
    grid: Grid
    times: tuple[float, ...]
    seconds_per_patch: float


def load_video(data: bytes, config: VideoConfig, *, field: str = "") -> VideoPatches:
    """Sample, resize, normalise and cut a video.

    Limits are checked from the file's header, before a frame is decoded. As in the reference's
    PyAV reader, rotation flags are not applied.

    Args:
      data: the encoded file: MP4/MOV, Matroska/WebM, AVI, MPEG, Ogg, FLV or GIF.
      field: path of the request field, for the error.

    Raises:
      InvalidInputError: empty (`EMPTY_VIDEO`), not a video or of an unknown codec
        (`UNREADABLE_VIDEO`), frames beyond `MAX_IMAGE_PIXELS` (`VIDEO_TOO_LARGE`), more than
        `MAX_VIDEO_FRAMES` of them (`VIDEO_TOO_LONG`), cut short or corrupt (`BROKEN_VIDEO`), or too
        elongated.
    """
    info = probe_video(data, field=field)
    indices = config.sample(info.frames, info.fps)
    height, width = config.size(len(indices), info.height, info.width, field=field)
    filling = _Filling(config, len(indices), height, width)
    for frame in sampled_frames(data, indices, info, field=field):
        filling.add(frame)
    patches, grid = filling.finish()
    return VideoPatches(
        patches=patches,
        grid=grid,
        times=config.times(indices, info.fps),
        seconds_per_patch=config.seconds_per_patch(len(indices), info.frames, info.fps),
    )


def video_bytes(config: VideoConfig, frames: int, height: int, width: int) -> int:
    """Bytes of the patches of `frames` sampled frames of this size: the bound of what is held."""
    h, w = config.size(frames, height, width)
    return 12 * (frames + -frames % config.temporal_patch_size) * h * w


def probe_video(data: bytes, *, field: str = "") -> VideoInfo:
    """Frames, rate and size, checked against the limits; no frame is decoded.

    Raises:
      InvalidInputError: as `load_video`.
    """
    with _opened(data, field) as (container, stream):
        context = stream.codec_context
        width, height = context.width, context.height
        if width * height > MAX_IMAGE_PIXELS:
            raise InvalidInputError(
                f"the video's frames have {width} x {height} pixels, the limit is "
                f"{MAX_IMAGE_PIXELS:,}; make them smaller",
                field=field,
                reason="VIDEO_TOO_LARGE",
                max_pixels=MAX_IMAGE_PIXELS,
            )
        fps = float(stream.average_rate or stream.guessed_rate or 24)
        # Matroska and others do not state the number; packets are counted without decoding them.
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if frames == 0 or width * height == 0:
        raise _unreadable(data, field)
    if frames > MAX_VIDEO_FRAMES:
        raise InvalidInputError(
            f"the video has {frames:,} frames, the limit is {MAX_VIDEO_FRAMES:,}; cut it in parts",
            field=field,
            reason="VIDEO_TOO_LONG",
            max_frames=MAX_VIDEO_FRAMES,
        )
    return VideoInfo(frames, fps, width, height)


def sampled_frames(
    data: bytes, indices: np.ndarray, info: VideoInfo, *, field: str = ""
) -> Iterator[Image.Image]:
    """The frames at ascending `indices`, one at a time, as RGB images.

    Raises:
      InvalidInputError: the file ends early or cannot be decoded (`BROKEN_VIDEO`).
    """
    wanted = indices.tolist()
    seen, last = 0, None
    with _opened(data, field) as (container, stream):
        for frame in container.decode(stream):
            if not wanted:
                return
            if wanted[0] == seen:
                # As Pillow's image, and no view of the decoder's buffer.
                last = frame.to_image()
                while wanted and wanted[0] == seen:
                    wanted.pop(0)
                    yield last
            seen += 1
    if wanted and (last is None or seen < info.frames * (1 - _TOLERATED_LOSS) - 1):
        raise InvalidInputError(
            f"the video is cut short or corrupt: it names {info.frames} frames, {seen} could be "
            "decoded; send the whole file",
            field=field,
            reason="BROKEN_VIDEO",
        )
    for _ in wanted:
        assert last is not None
        yield last


class _Filling:
    """The array of patches, filled by one frame after the other."""

    def __init__(self, config: VideoConfig, frames: int, height: int, width: int) -> None:
        self._config, self._size = config, (width, height)
        p, m, tp = config.patch_size, config.merge_size, config.temporal_patch_size
        self._grid: Grid = (-(-frames // tp), height // p, width // p)
        t, rows, columns = self._grid
        self._out = np.empty((t, rows // m, columns // m, m, m, 3, tp, p, p), np.float32)
        self._table = fused_levels(config.mean, config.std)
        self._count = 0

    def add(self, frame: Image.Image) -> None:
        resized = frame.convert("RGB").resize(self._size, Image.Resampling.BICUBIC)
        blocks = cut_blocks(np.asarray(resized), self._config.patch_size, self._config.merge_size)
        slice_, place = divmod(self._count, self._config.temporal_patch_size)
        for channel in range(3):
            levels = self._table[channel][blocks[:, :, :, :, channel]]
            self._out[slice_, :, :, :, :, channel, place] = levels
        self._count += 1

    def finish(self) -> tuple[np.ndarray, Grid]:
        """The patches; the last frame fills the last temporal patch up."""
        slice_, place = divmod(self._count - 1, self._config.temporal_patch_size)
        self._out[slice_, ..., place + 1 :, :, :] = self._out[slice_, ..., place : place + 1, :, :]
        return self._out.reshape(-1, self._config.patch_dim), self._grid


@lru_cache(maxsize=8)
def fused_levels(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """[3, 256] float32: what each 8-bit level becomes.

    The video processors subtract `mean * 255` and divide by `std * 255` in one step, unlike the
    image processors, and the last bit differs.
    """
    level = np.arange(256, dtype=np.float32)
    scale = np.float32(1.0 / (1 / 255))
    m, s = np.array(mean, np.float32) * scale, np.array(std, np.float32) * scale
    return (level[None] - m[:, None]) / s[:, None]


@contextmanager
def _opened(data: bytes, field: str) -> Iterator[tuple[Any, Any]]:
    if not data:
        raise InvalidInputError(
            "the video is empty (0 bytes); send the encoded file", field=field, reason="EMPTY_VIDEO"
        )
    import av  # as late as this: most services never see a video, and it takes long to load
    from av.error import FFmpegError

    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": FORMATS})
    except (FFmpegError, ValueError) as error:
        raise _unreadable(data, field) from error
    with container:
        if not container.streams.video:
            raise _unreadable(data, field)
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise InvalidInputError(
                "the video cannot be decoded: its codec is not known here; send it coded as H.264, "
                "VP9 or another common codec",
                field=field,
                reason="UNREADABLE_VIDEO",
            )
        try:
            yield container, stream
        except FFmpegError as error:
            raise InvalidInputError(
                f"the video is corrupt ({len(data)} bytes); send the whole file",
                field=field,
                reason="BROKEN_VIDEO",
            ) from error


def _unreadable(data: bytes, field: str) -> InvalidInputError:
    return InvalidInputError(
        f"the video cannot be read: {len(data)} bytes with no video in a known container "
        "(MP4, WebM, Matroska, AVI, MPEG, Ogg, FLV, GIF)",
        field=field,
        reason="UNREADABLE_VIDEO",
    )
