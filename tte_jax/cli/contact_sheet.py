"""The demo on one page: each query at the left, what was found for it at the right."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURE = 112
CELL = 148
QUERY_WIDTH = 250
ROW = 190
MARGIN = 16
HEADER = 64

_INK, _SOFT, _LINE = "#1b1f24", "#6a737d", "#d0d7de"
_RIGHT, _RERANKED = "#1a7f37", "#8250df"


@dataclass(frozen=True)
class Found:
    """One result.

    Attributes:
      picture: the document's image file; None = it has none that can be drawn.
      name: what it is called.
      cosine: first-stage score.
      rerank: the reranker's P(yes), None when it did not score it.
      first_rank: its rank in the first stage (from 1), None when it was not among the shown.
      right: whether it is a right answer.
    """

    picture: bytes | None
    name: str
    cosine: float
    rerank: float | None
    first_rank: int | None
    right: bool


@dataclass(frozen=True)
class Row:
    """One query: its text, its picture if it has one, a remark, and the results best first."""

    text: str
    picture: bytes | None
    remark: str
    found: Sequence[Found]


def draw(title: str, legend: str, rows: Sequence[Row]) -> Image.Image:
    """The sheet as an RGB image; as wide as the longest row of results."""
    columns = max((len(row.found) for row in rows), default=0)
    width = max(2 * MARGIN + QUERY_WIDTH + columns * CELL, 720)
    sheet = Image.new("RGB", (width, HEADER + ROW * len(rows) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 12), title, fill=_INK, font=_font(20))
    pen.text((MARGIN, 38), legend, fill=_SOFT, font=_font(13))
    for number, row in enumerate(rows):
        top = HEADER + number * ROW
        pen.line((MARGIN, top, width - MARGIN, top), fill=_LINE)
        _draw_query(sheet, pen, row, top + 10)
        for place, found in enumerate(row.found):
            left = MARGIN + QUERY_WIDTH + place * CELL
            _draw_found(sheet, pen, found, place + 1, left, top + 10)
    return sheet


def write(path: Path, title: str, legend: str, rows: Sequence[Row]) -> None:
    """Draws the sheet into a PNG file; its folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(title, legend, rows).save(path, format="PNG", optimize=True)


def _draw_query(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    left = MARGIN
    if row.picture is not None:
        _paste(sheet, row.picture, left, top)
        left += PICTURE + 10
    columns = 12 if row.picture is not None else 26
    lines = textwrap.wrap(row.text, columns)[:7]
    pen.multiline_text((left, top), "\n".join(lines), fill=_INK, font=_font(15), spacing=4)
    # The built-in font has no arrows.
    remark = textwrap.wrap(row.remark.replace("→", "->"), 40)[:3]
    pen.multiline_text((MARGIN, top + 122), "\n".join(remark), fill=_SOFT, font=_font(12))


def _draw_found(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, found: Found, rank: int, left: int, top: int
) -> None:
    _paste(sheet, found.picture, left + 4, top + 4)
    box = (left, top, left + PICTURE + 8, top + PICTURE + 8)
    colour = _RIGHT if found.right else _RERANKED if found.rerank is not None else _LINE
    pen.rectangle(box, outline=colour, width=4 if found.right else 2)
    moved = ""
    if found.rerank is not None and found.first_rank != rank:
        moved = f"  (was {found.first_rank})" if found.first_rank else "  (new)"
    scores = f"cos {found.cosine:.2f}"
    if found.rerank is not None:
        scores += f"  yes {found.rerank:.2f}"
    name = textwrap.shorten(found.name, 24, placeholder="…")
    y = top + PICTURE + 12
    pen.text((left, y), f"#{rank}{moved}", fill=_INK, font=_font(13))
    pen.text((left, y + 16), scores, fill=_RERANKED if found.rerank is not None else _SOFT,
             font=_font(12))  # fmt: skip
    pen.text((left, y + 31), name, fill=_SOFT, font=_font(11))


def _paste(sheet: Image.Image, data: bytes | None, left: int, top: int) -> None:
    if data is None:
        pen = ImageDraw.Draw(sheet)
        pen.rectangle((left, top, left + PICTURE, top + PICTURE), fill=_LINE)
        pen.text((left + 22, top + 48), "no picture", fill=_SOFT, font=_font(13))
        return
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((PICTURE, PICTURE))
    sheet.paste(picture, (left, top))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
