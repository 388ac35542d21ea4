"""Names of the files that `tte get --save` writes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tte_jax.cli.documents import _save
from tte_jax.content import Content, Document, Media, MediaKind
from tte_jax.errors import InvalidInputError


def encoded(format: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(out, format)
    return out.getvalue()


VIDEO = MediaKind.VIDEO


@pytest.mark.parametrize(
    ("media", "suffix"),
    [
        *((Media(encoded(f)), s) for f, s in [
            ("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"),
            ("TIFF", ".tif"),
        ]),
        (Media(b"RIFF0000AVI LIST", VIDEO), ".avi"),
        (Media(b"\x00\x00\x00\x20ftypisom", VIDEO), ".mp4"),
        (Media(b"\x00\x00\x00\x14ftypqt  ", VIDEO), ".mov"),
        (Media(b"\x1aE\xdf\xa3....", VIDEO), ".mkv"),
        (Media(b"%PDF-1.7", MediaKind.PAGE), ".pdf"),
        (Media(b"FLV\x01", VIDEO), ".bin"),
    ],
)  # fmt: skip
def test_a_files_name_ends_as_its_kind_does(tmp_path: Path, media: Media, suffix: str) -> None:
    (path,) = _save(Document("a/b", Content((media,))), tmp_path / "saved")
    assert path.name == f"a_b{suffix}" and path.read_bytes() == media.data


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(InvalidInputError, match=r"there: .*give a folder"):
        _save(Document("a", Content((Media(b"x"),))), tmp_path / "there")
