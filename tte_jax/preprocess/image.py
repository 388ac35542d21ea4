"""Encoded image bytes to RGB pixels, with every way an upload can be bad named in the error."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tte_jax.errors import InvalidInputError
from tte_jax.limits import MAX_IMAGE_PIXELS

# Pillow knows formats that start other programs (EPS) or that are archives of anything; an upload
# may only be one of these.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(
    data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS, field: str = ""
) -> Image.Image:
    """Decode one image to 8-bit RGB.

    Transparency is composited on white, since a transparent pixel's hidden colour is arbitrary
    (often black). As in the reference processor, EXIF orientation is not applied, and of an
    animation the first frame counts. Unlike it, 16-bit greyscale keeps its upper 8 bits: clipped
    to 255, such a scan would be a white sheet.

    Args:
      data: the encoded file, one of `FORMATS`.
      max_pixels: the largest width x height; checked from the header, before any pixel is decoded.
      field: path of the request field, for the error.

    Raises:
      InvalidInputError: the file is empty (`EMPTY_IMAGE`), not an image or of another format
        (`UNREADABLE_IMAGE`), cut short or corrupt (`BROKEN_IMAGE`), or larger than `max_pixels`
        (`IMAGE_TOO_LARGE`).
    """
    if not data:
        raise InvalidInputError(
            "the image is empty (0 bytes); send the encoded file", field=field, reason="EMPTY_IMAGE"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("far more", max_pixels, field) from error
    except Exception as error:  # header parsers raise nearly anything on hostile bytes
        raise InvalidInputError(
            f"the image cannot be read: {len(data)} bytes that are none of {', '.join(FORMATS)}",
            field=field,
            reason="UNREADABLE_IMAGE",
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height} = {width * height:,}", max_pixels, field)
    try:
        image.load()
        return _to_rgb(image)
    except Exception as error:  # so do pixel decoders: OSError, SyntaxError, struct.error, ...
        raise InvalidInputError(
            f"the {image.format} image of {width} x {height} pixels is cut short or corrupt "
            f"({len(data)} bytes); send the whole file",
            field=field,
            reason="BROKEN_IMAGE",
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _too_large(found: str, max_pixels: int, field: str) -> InvalidInputError:
    return InvalidInputError(
        f"the image has {found} pixels, the limit is {max_pixels:,}; make it smaller",
        field=field,
        reason="IMAGE_TOO_LARGE",
        max_pixels=max_pixels,
    )
