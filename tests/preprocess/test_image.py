from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.image import decode_image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that claims a size but holds no pixels: decoding it would fail, its header is fine."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_decodes_to_rgb(form: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (7, 5), (200, 30, 40)), form))
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert np.allclose(np.asarray(image)[2, 3], (200, 30, 40), atol=12)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EMPTY_IMAGE"),
        (b"not an image at all", "UNREADABLE_IMAGE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UNREADABLE_IMAGE"),
        (encoded(noise(64, 64))[:900], "BROKEN_IMAGE"),
        (encoded(noise(64, 64), "JPEG")[:900], "BROKEN_IMAGE"),
        (header_only_png(20_000, 5_000), "IMAGE_TOO_LARGE"),
        (header_only_png(60_000, 60_000), "IMAGE_TOO_LARGE"),
        (header_only_png(0, 5), "UNREADABLE_IMAGE"),
    ],
)
def test_bad_files_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        decode_image(data, field="query.parts[0].image")
    assert caught.value.reason == reason
    assert caught.value.field == "query.parts[0].image"


def test_pixel_limit_is_inclusive() -> None:
    data = encoded(noise(10, 10))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(InvalidInputError, match="10 x 10 = 100"):
        decode_image(data, max_pixels=99)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    pixels = np.asarray(decode_image(encoded(clear)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [255, 127, 127]

    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert np.asarray(decode_image(buffer.getvalue())).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_keep_their_upper_half() -> None:
    deep = Image.fromarray(np.array([[0, 0x0180, 0x7FFF, 0xFFFF]], np.uint16))
    pixels = np.asarray(decode_image(encoded(deep)))
    assert pixels.tolist() == [[[v] * 3 for v in (0, 1, 127, 255)]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_bytes_to_patches_as_the_reference(mode: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from tte_jax.preprocess.patches import ImageConfig, patchify

    pixels = np.random.default_rng(4).integers(0, 256, (45, 70, 4), np.uint8)
    data = encoded(Image.fromarray(pixels, "RGBA").convert(mode))
    reference = Qwen2VLImageProcessorPil()(images=[Image.open(io.BytesIO(data))])
    patches, _ = patchify(decode_image(data), ImageConfig())
    np.testing.assert_array_equal(patches, reference["pixel_values"])
