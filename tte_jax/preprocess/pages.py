"""Pages of a PDF to RGB images, one page in memory at a time."""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from tte_jax.errors import InvalidInputError
from tte_jax.limits import MAX_PAGE_PIXELS, MAX_PAGES

DPI = 144
"""Enough for 8-point print; models shrink a page to their own limit afterwards."""

_POINTS_PER_INCH = 72
_PASSWORD = 4  # FPDF_ERR_PASSWORD

# What PDFium writes into a new file; replaced by as many bytes, so that offsets stay right.
_DATE = re.compile(rb"(/CreationDate\(D:)([0-9]+)")
_IDS = re.compile(rb"/ID\[<[0-9A-Fa-f]{32}><[0-9A-Fa-f]{32}>\]")

# PDFium has global state and is not safe to call from two threads, even for two documents.
_PDFIUM = threading.Lock()


def render_page(
    data: bytes,
    page: int = 0,
    *,
    dpi: float = DPI,
    max_pixels: int = MAX_PAGE_PIXELS,
    field: str = "",
) -> Image.Image:
    """One page on white paper, at `dpi` or as much less as `max_pixels` needs.

    Args:
      data: the PDF file.
      page: zero-based.
      max_pixels: the largest width x height of the result; checked before anything is drawn.
      field: path of the request field, for the error.

    Raises:
      InvalidInputError: empty (`EMPTY_PAGE`), no PDF or a broken one (`UNREADABLE_PAGE`),
        encrypted (`ENCRYPTED_PAGE`), without pages (`NO_PAGES`), more than `MAX_PAGES`
        (`TOO_MANY_PAGES`), no such page (`PAGE_OUT_OF_RANGE`).
    """
    with _PDFIUM, _opened(data, field) as document:
        _check_number(document, page, field)
        return _render(document, page, dpi, max_pixels, field)


def page_count(data: bytes, *, field: str = "") -> int:
    """Number of pages.

    Raises:
      InvalidInputError: as `render_page`.
    """
    with _PDFIUM, _opened(data, field) as document:
        return len(document)


def single_page(data: bytes, page: int, *, field: str = "") -> bytes:
    """One page as a PDF of its own; the same bytes for the same page, every time.

    Args:
      page: zero-based.

    Raises:
      InvalidInputError: as `render_page`.
    """
    import pypdfium2

    with _PDFIUM, _opened(data, field) as document:
        _check_number(document, page, field)
        if len(document) == 1:
            return data
        alone = pypdfium2.PdfDocument.new()
        try:
            alone.import_pages(document, [page])
            out = io.BytesIO()
            alone.save(out)
        except pypdfium2.PdfiumError as error:
            raise InvalidInputError(
                f"page {page} of the PDF cannot be taken out; send a repaired file",
                field=field,
                reason="UNREADABLE_PAGE",
            ) from error
        finally:
            alone.close()
    # PDFium stamps the time and a random number; the content's hash must not depend on them.
    unstamped = _DATE.sub(lambda found: found[1] + b"0" * len(found[2]), out.getvalue())
    return _IDS.sub(b"/ID[<" + b"0" * 32 + b"><" + b"0" * 32 + b">]", unstamped)


def render_pages(
    data: bytes, *, dpi: float = DPI, max_pixels: int = MAX_PAGE_PIXELS, field: str = ""
) -> Iterator[Image.Image]:
    """All pages in order. Each is drawn when it is asked for and closed before the next, so the
    file and one page (3 bytes per pixel, 4 while it is drawn) are all that is held.

    Raises:
      InvalidInputError: as `render_page`.
    """
    for page in range(page_count(data, field=field)):
        yield render_page(data, page, dpi=dpi, max_pixels=max_pixels, field=field)


def _check_number(document: Any, page: int, field: str) -> None:
    count = len(document)
    if not 0 <= page < count:
        raise InvalidInputError(
            f"the PDF has {count} pages, numbered from 0; there is no page {page}",
            field=field,
            reason="PAGE_OUT_OF_RANGE",
            pages=count,
        )


def _render(document: Any, number: int, dpi: float, max_pixels: int, field: str) -> Image.Image:
    import pypdfium2

    try:
        page = document[number]
        try:
            width, height = page.get_size()
            scale = dpi / _POINTS_PER_INCH
            pixels = math.ceil(width * scale) * math.ceil(height * scale)
            if pixels > max_pixels:
                scale *= math.sqrt(max_pixels / pixels)
                # Sides are rounded up, so a few more dots may have to go.
                while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
                    scale *= 0.999
            bitmap = page.render(scale=scale, rev_byteorder=True)
            try:
                return bitmap.to_pil().convert("RGB").copy()
            finally:
                bitmap.close()
        finally:
            page.close()
    except (pypdfium2.PdfiumError, ValueError, ZeroDivisionError) as error:
        raise InvalidInputError(
            f"page {number} of the PDF cannot be drawn; send a repaired file",
            field=field,
            reason="UNREADABLE_PAGE",
        ) from error


@contextmanager
def _opened(data: bytes, field: str) -> Iterator[Any]:
    if not data:
        raise InvalidInputError(
            "the PDF is empty (0 bytes); send the file", field=field, reason="EMPTY_PAGE"
        )
    import pypdfium2  # as late as this: most services never see a PDF

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        # PDFium's code may be that of an earlier failure: a file without pages sets none. So the
        # bytes are looked at too.
        if getattr(error, "err_code", None) == _PASSWORD and b"/Encrypt" in data:
            raise InvalidInputError(
                "the PDF is encrypted with a password; send it without one",
                field=field,
                reason="ENCRYPTED_PAGE",
            ) from error
        if re.search(rb"/Kids\s*\[\s*\]", data):
            raise InvalidInputError(
                "the PDF has no pages", field=field, reason="NO_PAGES"
            ) from error
        raise InvalidInputError(
            f"the PDF cannot be read: {len(data)} bytes that are not a PDF, or a broken one",
            field=field,
            reason="UNREADABLE_PAGE",
        ) from error
    try:
        count = len(document)
        if count > MAX_PAGES:
            raise InvalidInputError(
                f"the PDF has {count:,} pages, the limit is {MAX_PAGES:,}; cut it in parts",
                field=field,
                reason="TOO_MANY_PAGES",
                max_pages=MAX_PAGES,
            )
        yield document
    finally:
        document.close()
