"""The contact sheet: readable back as an image, right answers framed in green."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageColor

from tte_jax.cli import contact_sheet
from tte_jax.cli.contact_sheet import Found, Row


def picture(colour: str, size: tuple[int, int] = (112, 112)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def found(colour: str, *, right: bool = False, rerank: float | None = 0.5, first: int | None = 1):
    return Found(picture(colour), colour, 0.9, rerank, first, right)


def test_every_query_and_result_is_on_the_sheet(tmp_path: Path) -> None:
    rows = [
        Row("a very long text " * 9, None, "ECR: …", [found("red", right=True), found("blue")]),
        Row("", picture("lime", (300, 40)), "", [found("orange", rerank=None, first=None)]),
        Row("nothing found", None, "", []),
    ]
    path = tmp_path / "new" / "sheet.png"
    contact_sheet.write(path, "title", "legend", rows)
    sheet = Image.open(path)
    sheet.load()
    colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24) or []}
    for name in ("red", "blue", "lime", "orange"):
        assert ImageColor.getrgb(name) in colours, name
    assert sheet.height == contact_sheet.HEADER + 3 * contact_sheet.ROW + contact_sheet.MARGIN


def test_frames_tell_right_reranked_and_tail_apart() -> None:
    def frame(result: Found) -> tuple[int, ...]:
        sheet = contact_sheet.draw("", "", [Row("", None, "", [result])])
        left = contact_sheet.MARGIN + contact_sheet.QUERY_WIDTH
        return sheet.getpixel((left, contact_sheet.HEADER + 40))  # type: ignore[return-value]

    right = frame(found("red", right=True))
    reranked = frame(found("red"))
    tail = frame(found("red", rerank=None))
    assert len({right, reranked, tail}) == 3
    assert right[1] > right[0] and right[1] > right[2], "green"


def test_a_move_by_the_reranker_is_marked() -> None:
    def sheet(first: int | None) -> bytes:
        return contact_sheet.draw(
            "", "", [Row("", None, "", [found("red", first=first)])]
        ).tobytes()

    assert sheet(1) != sheet(4) != sheet(None)


def test_a_document_without_a_picture_has_its_place() -> None:
    sheet = contact_sheet.draw(
        "", "", [Row("", None, "", [Found(None, "a film", 0.9, 0.5, 1, False)])]
    )
    left = contact_sheet.MARGIN + contact_sheet.QUERY_WIDTH
    middle = sheet.getpixel((left + 10, contact_sheet.HEADER + 20))
    assert middle == ImageColor.getrgb("#d0d7de")
