"""SVG drawings to the 112 × 112 pictures that the built-in corpus and the demo use."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tte_jax.errors import DataLossError, PreconditionError

SIZE = 112
ICON = 104


def picture(svg: Path, *, size: int = SIZE, icon: int = ICON) -> Image.Image:
    """The drawing, `icon` pixels square, centred on `size` × `size` white; RGB.

    Raises PreconditionError without the package `resvg-py`, DataLossError when the file is missing
    or not an SVG.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise PreconditionError(
            "Rendering emoji needs the package `resvg-py`, which is not installed; run "
            "`pip install resvg-py`.",
            reason="PACKAGE_MISSING",
            package="resvg-py",
        ) from error
    try:
        # The drawings hold no text, and scanning the system's fonts takes longer than they do.
        png = resvg_py.svg_to_bytes(
            svg_path=str(svg), width=icon, height=icon, skip_system_fonts=True
        )
        drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    except (OSError, ValueError) as error:
        raise DataLossError(
            f"{svg} cannot be drawn; install the package it belongs to again.",
            reason="UNREADABLE_SVG",
            path=svg,
        ) from error
    canvas = Image.new("RGB", (size, size), "white")
    offset = ((size - drawing.width) // 2, (size - drawing.height) // 2)
    canvas.paste(drawing, offset, drawing)
    return canvas


def png(image: Image.Image) -> bytes:
    """The image as PNG bytes; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
