"""SVG bodies to RGB arrays."""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from training.data.icons import Icon

SIZE = 112
ICON_SIZE = 104  # longest side of the icon inside the SIZE x SIZE image, in pixels


class RenderError(ValueError):
    """An SVG could not be rendered, or shows nothing."""


def wrap(icon: Icon, body: str) -> str:
    """A standalone square SVG document: `body` centred, longest side ICON_SIZE of SIZE pixels."""
    side = max(icon.width, icon.height) * SIZE / ICON_SIZE
    left = icon.left - (side - icon.width) / 2
    top = icon.top - (side - icon.height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{left:g} {top:g} {side:g} {side:g}">{body}</svg>'
    )


def render(icon: Icon, body: str, background: str = "#ffffff") -> NDArray[np.uint8]:
    """Renders `body` in `icon`'s view box to uint8 RGB `[SIZE, SIZE, 3]` on a solid background.

    Raises RenderError when the SVG is invalid.
    """
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=wrap(icon, body), background=background, skip_system_fonts=True
        )
    except ValueError as error:
        raise RenderError(f"icon {icon.name!r} cannot be rendered: {error}") from error
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def ink(image: NDArray[np.uint8]) -> float:
    """Share of pixels that differ visibly from the image's corner pixel (its background)."""
    difference = np.abs(image.astype(np.int16) - image[0, 0].astype(np.int16)).max(axis=-1)
    return float((difference > 24).mean())
