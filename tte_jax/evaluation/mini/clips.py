"""Animated emoji of Microsoft's Fluent set, as an npm package holds them.

A style that the built-in models were not trained on. Its motion is mild (waving, nodding): much of
these tasks can be solved from one frame. Cartoons, no real video.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tte_jax.builtin import emoji_names
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.packages import Archive, Package, Registry
from tte_jax.evaluation.mini.workshop import Workshop

FLUENT = Package(
    "@lobehub/fluent-emoji-anim-1",
    Registry.NPM,
    "MIT",
    version="1.0.0",
    sha256="4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    megabytes=165,
)
FRAMES = 16
"""Of each animation, evenly spaced; the longest have 97."""


def text_to_video(shop: Workshop) -> None:
    """A name; the candidates are the animations."""
    shop.rows({"video_id": code, "caption": name} for code, name in _animations(shop))


def classification(shop: Workshop) -> None:
    """An animation; the candidates are all names."""
    made = _animations(shop)
    names = [name for _, name in made]
    shop.rows({"video_id": code, "pos_text": name, "neg_text": names} for code, name in made)


def _animations(shop: Workshop) -> list[tuple[str, str]]:
    """(code points, name) of as many as there are queries; their frames are written."""
    archive = shop.packages[FLUENT.name]
    moving = {code: (name, data) for code, name, data in _moving(archive)}
    shop.at_most(len(moving), "animations")
    chosen = concepts.by_hash(moving, str)[: shop.queries]
    for done, code in enumerate(chosen, start=1):
        shop.frames(code, _frames(moving[code][1]))
        shop.progress(done)
    return [(code, moving[code][0]) for code in chosen]


def _moving(archive: Archive) -> Iterator[tuple[str, str, bytes]]:
    """(code points, name, file) of the animations; half of the files are stills, and skin tones
    show the same thing again."""
    for path, data in archive.files(lambda name: name.endswith(".webp")):
        code = path.rpartition("/")[2].removesuffix(".webp").upper()
        shown = emoji_names.attributes(code)
        if shown is None or shown.skin != emoji_names.NONE:
            continue
        with Image.open(io.BytesIO(data)) as file:
            if getattr(file, "n_frames", 1) > 1:
                yield code, shown.name, data


def _frames(data: bytes) -> list[Image.Image]:
    """At most `FRAMES`, on white."""
    images = []
    with Image.open(io.BytesIO(data)) as file:
        count: int = getattr(file, "n_frames", 1)
        wanted = np.linspace(0, count - 1, min(FRAMES, count), dtype=int)
        for number in wanted:
            file.seek(int(number))
            frame = file.convert("RGBA")
            canvas = Image.new("RGB", frame.size, "white")
            canvas.paste(frame, (0, 0), frame)
            images.append(canvas)
    return images
