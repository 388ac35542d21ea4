"""Frame folders as videos: which frames are looked at, and how they become one `Media`.

A video of the benchmark is a folder of up to 64 JPEG frames. The frames that are looked at are
written, without loss, into a small Matroska file at two frames per second: the rate at which the
models' video processors sample by default, so that they see exactly these.
"""

from __future__ import annotations

import io
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tte_jax.content import Content, Media, MediaKind, Text
from tte_jax.errors import DataLossError

SUFFIXES = (".jpg", ".jpeg", ".png")
RATE = 2
# Far above what a processor gives one frame of several; keeps eight frames within a request.
MAX_PIXELS = 1_000_000


def frame_paths(folder: Path, count: int = 0) -> list[Path]:
    """The frames of a folder by the numbers in their names; of more than `count`, evenly spaced.

    `count` 0 = all. Empty when there is no such folder or nothing in it.
    """
    if not folder.is_dir():
        return []
    found = sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES), key=_natural)
    if not count or len(found) < count:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, count, dtype=int)]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(p)) if p.isdigit() else (1, p) for p in parts]


def video_content(paths: list[Path], text: str = "") -> Content:
    """The frames as one video, and the text behind it."""
    media = Media(encode(paths), MediaKind.VIDEO)
    return Content((media, Text(text)) if text.strip() else (media,))


def encode(paths: list[Path]) -> bytes:
    """A Matroska file (FFV1, no loss) of the frames, all in the first one's size.

    Raises:
      DataLossError: a frame cannot be read.
    """
    out = io.BytesIO()
    frames = [_image(path) for path in paths]
    width, height = frames[0].size
    # Else the file holds random ids, and equal frames make other bytes each time.
    exact = {"fflags": "+bitexact"}
    with av.open(out, "w", format="matroska", options=exact) as container:
        stream = container.add_stream("ffv1", rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for frame in frames:
            if frame.size != (width, height):
                frame = frame.resize((width, height), Image.Resampling.BICUBIC)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise DataLossError(
            f"The frame {path} cannot be read ({error}). Unpack its archive again.",
            reason="UNREADABLE_DATA",
        ) from error
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        scale = (MAX_PIXELS / pixels) ** 0.5
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image
