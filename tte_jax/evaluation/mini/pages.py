"""The reference manual of R: a description finds its page.

Every topic begins with a heading and a paragraph "Description"; that paragraph is the query. The
page where it stands has grade 2, pages that the topic alone fills have grade 1. Query and page
share words: a model that reads the page can find it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tte_jax.builtin.pictures import png
from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.packages import Package, Registry
from tte_jax.evaluation.mini.workshop import Workshop

R_MANUAL = Package("r-doc-pdf", Registry.DEBIAN, "GPL-2+", megabytes=10)
FILE = "usr/share/R/doc/manual/fullrefman.pdf"
DPI = 100
SHOWN, CONTINUED = 2, 1  # grades
_NEXT = "Usage|Details|Format|Arguments"
"""What may come below a description."""
LONGEST = 400
"""Characters of a query; a description may be a page."""


@dataclass(frozen=True)
class Topic:
    """A topic of the manual: its name, its description, and the pages it begins on and alone fills,
    counted from 0."""

    name: str
    description: str
    page: int
    more: tuple[int, ...] = ()


def manual(shop: Workshop) -> None:
    """Descriptions as queries, pages as candidates, grades between them."""
    data = shop.packages[R_MANUAL.name].file(FILE)
    with _opened(data) as document:
        found = concepts.by_hash(topics(document), lambda topic: f"{topic.page} {topic.name}")
        shop.at_most(len(found), "topics")
        found = found[: shop.queries]
        pool = _pool(shop, found, len(document))
        shop.rows(
            ({"query-id": n, "query": topic.description} for n, topic in enumerate(found)),
            "queries",
        )
        shop.rows(
            (
                {
                    "query-id": n,
                    "corpus-id": page,
                    "score": SHOWN if page == topic.page else CONTINUED,
                }
                for n, topic in enumerate(found)
                for page in (topic.page, *topic.more)
            ),
            "qrels",
        )
        shop.rows(_corpus(shop, document, pool), "corpus")


def _pool(shop: Workshop, found: list[Topic], count: int) -> list[int]:
    """The right pages and others by hash, in the manual's order."""
    right = {page for topic in found for page in (topic.page, *topic.more)}
    wanted = min(shop.pages or count, count)
    if wanted < len(right):
        raise InvalidInputError(
            f"--pages is {shop.pages}; {shop.queries} queries have {len(right)} right pages, so "
            "give at least that many, or 0 for all.",
            field="--pages",
        )
    others = concepts.by_hash((p for p in range(count) if p not in right), str)
    return sorted([*right, *others[: wanted - len(right)]])


def _corpus(shop: Workshop, document: Any, pool: list[int]) -> Iterator[dict[str, object]]:
    for done, number in enumerate(pool, start=1):
        image = {"bytes": png(drawn(document, number)), "path": None}
        yield {"corpus-id": number, "image": image}
        shop.progress(done)


def drawn(document: Any, number: int) -> Image.Image:
    """A page in grey, 100 dots an inch: A4 is 827 × 1170."""
    page = document[number]
    bitmap = page.render(scale=DPI / 72, grayscale=True)
    image = bitmap.to_pil().convert("L").copy()
    bitmap.close()
    page.close()
    return image


def topics(document: Any) -> list[Topic]:
    """The topics of the outline whose description stands on the page where they begin."""
    entries = []
    for mark in document.get_toc():
        place = mark.get_dest()
        page = place.get_index() if place else None
        if page is not None:
            entries.append((mark.level, mark.get_title(), page))
    found = []
    for (level, title, page), (_, _, following) in zip(
        entries, [*entries[1:], (0, "", len(document))], strict=True
    ):
        if level and (text := _description(_text(document, page), title)):
            found.append(Topic(title, text, page, tuple(range(page + 1, following))))
    return found


def _text(document: Any, number: int) -> str:
    page = document[number]
    layer = page.get_textpage()
    text = layer.get_text_range()
    layer.close()
    page.close()
    # A hyphen at the end of a line, as PDFium gives it.
    return re.sub(r"[\ufffe\x02\u00ad]", "", text.replace("\r\n", "\n"))


def _description(text: str, title: str) -> str:
    """The paragraph below "Description" under the topic's heading; "" where there is none."""
    # The heading is the topic's name and a title, which may go on in a second line.
    heading = rf"^{re.escape(title)} [^\n]*(?:\n[^\n]+)?\nDescription\n"
    match = re.search(heading + rf"(.+?)\n(?:{_NEXT})\n", text, re.M | re.S)
    if match is None:
        return ""
    said = " ".join(match[1].split())
    if len(said) > LONGEST:
        said = said[:LONGEST].rpartition(" ")[0]
    return said


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    import pypdfium2  # as late as this: every command of `tte` reads this file

    try:
        document = pypdfium2.PdfDocument(io.BytesIO(data))
    except pypdfium2.PdfiumError as error:
        raise DataLossError(
            f"{FILE} of {R_MANUAL.name} cannot be read ({error}). Delete the package's file; it is "
            "downloaded again.",
            reason="UNREADABLE_DATA",
        ) from error
    try:
        yield document
    finally:
        document.close()
