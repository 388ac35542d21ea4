from __future__ import annotations

import io
import time
import tracemalloc

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium_c
import pytest

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess import pages as pages_module
from tte_jax.preprocess.pages import page_count, render_page, render_pages, single_page


def pdf(pages: int, width: float = 72, height: float = 144) -> bytes:
    """A PDF whose page i has a black bar of height i + 1 points at its bottom."""
    document = pypdfium2.PdfDocument.new()
    for i in range(pages):
        page = document.new_page(width, height)
        bar = pdfium_c.FPDFPageObj_CreateNewRect(0, 0, width, i + 1)
        pdfium_c.FPDFPageObj_SetFillColor(bar, 0, 0, 0, 255)
        pdfium_c.FPDFPath_SetDrawMode(bar, 1, 0)
        pdfium_c.FPDFPage_InsertObject(page, bar)
        page.gen_content()
        page.close()
    out = io.BytesIO()
    document.save(out)
    document.close()
    return out.getvalue()


def test_a_page_has_the_size_of_its_dpi() -> None:
    image = render_page(pdf(3), 2, dpi=144)
    assert image.size == (144, 288) and image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels[-6:] == 0).all(), "3 points are 6 dots"
    assert (pixels[:-7] == 255).all(), "the paper is white"


def test_a_large_sheet_is_drawn_with_fewer_dots() -> None:
    image = render_page(pdf(1, 720, 1440), dpi=144, max_pixels=50_000)
    assert 45_000 < image.width * image.height <= 50_000
    assert image.height / image.width == pytest.approx(2, rel=0.02)


def test_a_hundred_pages_stream() -> None:
    data = pdf(100, 144, 144)
    assert page_count(data) == 100
    one = 288 * 288 * 4
    bars = []
    tracemalloc.start()
    for image in render_pages(data):
        bars.append(int((np.asarray(image)[:, 0, 0] == 0).sum()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bars == [2 * (i + 1) for i in range(100)]
    assert peak < 4 * one + len(data), "not a hundred pages"


@pytest.mark.parametrize(
    ("data", "page", "reason"),
    [
        (b"", 0, "EMPTY_PAGE"),
        (b"%PDF-1.7 and nothing behind it", 0, "UNREADABLE_PAGE"),
        (pdf(2), 2, "PAGE_OUT_OF_RANGE"),
        (pdf(2)[:300], 0, "UNREADABLE_PAGE"),
        (pdf(0), 0, "NO_PAGES"),
    ],
)
def test_what_cannot_be_drawn(data: bytes, page: int, reason: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        render_page(data, page, field="c.parts[0].page.data")
    assert (caught.value.reason, caught.value.field) == (reason, "c.parts[0].page.data")


# An empty document encrypted with 40-bit RC4 (revision 2), whose user password nobody has.
ENCRYPTED = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>endobj\n"
    b"4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<"
    + b"11" * 32
    + b">/U<"
    + b"22" * 32
    + b">>>endobj\n"
    b"trailer<</Root 1 0 R/Size 5/Encrypt 4 0 R/ID[<00><00>]>>\n%%EOF\n"
)


def test_an_encrypted_document() -> None:
    with pytest.raises(InvalidInputError, match="password") as caught:
        render_page(ENCRYPTED)
    assert caught.value.reason == "ENCRYPTED_PAGE"


def test_too_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_PAGES", 4)
    with pytest.raises(InvalidInputError, match="5 pages") as caught:
        page_count(pdf(5))
    assert caught.value.reason == "TOO_MANY_PAGES"


def test_a_page_alone_looks_the_same_and_has_the_same_bytes_every_time() -> None:
    data = pdf(4)
    alone = single_page(data, 2)
    assert page_count(alone) == 1 and len(alone) < len(data)
    np.testing.assert_array_equal(
        np.asarray(render_page(alone, 0)), np.asarray(render_page(data, 2))
    )
    time.sleep(1.1)  # PDFium stamps seconds
    assert single_page(data, 2) == alone
    assert single_page(data, 1) != alone
    one = pdf(1)
    assert single_page(one, 0) == one
    with pytest.raises(InvalidInputError) as caught:
        single_page(data, 4)
    assert caught.value.reason == "PAGE_OUT_OF_RANGE"
