"""JSONL manifests: a document a line, read line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tte_jax.cli.files import MAX_FILE_BYTES, Pdf, read_file, read_video
from tte_jax.content import Content, Media, Metadata, MetadataValue, Text
from tte_jax.errors import InvalidInputError, NotFoundError, TteError

MANIFEST_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_FIELDS = ("id", "text", "image", "images", "video", "pdf", "page", "metadata")


@dataclass(frozen=True)
class Line:
    """A line that can be read: its documents' id and metadata, and what they hold.

    Attributes:
      number: of the line, from 1.
      pdf: a document a page of it, when set; the id is then that of the whole.
    """

    number: int
    id: str
    content: Content
    metadata: Metadata
    pdf: Pdf | None = None


@dataclass(frozen=True)
class BadLine:
    number: int
    error: TteError


def lines(path: Path) -> Iterator[Line | BadLine]:
    """The manifest's lines; files are named relative to it.

    Raises NotFoundError or InvalidInputError when the manifest itself cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist.", reason="FILE_NOT_FOUND") from None
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error.strerror or error}.", reason="UNREADABLE_FILE"
        ) from error
    with file:
        number = 0
        while raw := file.readline(MAX_FILE_BYTES + 1):
            number += 1
            if len(raw) > MAX_FILE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_FILE_BYTES)
                error = InvalidInputError(
                    f"the line has more than {MAX_FILE_BYTES:,} bytes", reason="LINE_TOO_LONG"
                )
                yield BadLine(number, error)
                continue
            if not raw.strip():
                continue
            try:
                yield _line(number, raw, path.parent)
            except (NotFoundError, InvalidInputError) as error:
                yield BadLine(number, error)


def _line(number: int, raw: bytes, folder: Path) -> Line:
    row = parse_json(raw, "the line")
    if not isinstance(row, dict):
        raise _invalid("the line is not a JSON object.")
    if unknown := set(row) - set(_FIELDS):
        raise _invalid(
            f"unknown fields {', '.join(sorted(unknown))}; expected {', '.join(_FIELDS)}."
        )
    if "image" in row and "images" in row:
        raise _invalid("give either image or images, not both.")
    names = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise _invalid("image must be a file name, images a list of them.")
    texts = {field: row.get(field, "") for field in ("text", "video", "pdf")}
    for field, value in texts.items():
        if not isinstance(value, str):
            raise _invalid(f"{field} must be a string.")
    text, video, pdf = texts.values()
    page = row.get("page")
    if page is not None and (isinstance(page, bool) or not isinstance(page, int) or not pdf):
        raise _invalid("page must be a whole number from 1, beside pdf.")
    parts: list[Media | Text] = [Media(read_file(folder / name)) for name in names]
    if video:
        parts.append(read_video(folder / video))
    opened = Pdf(folder / pdf) if pdf else None
    if opened and page is not None:
        parts.append(opened.page(page))
        opened = None
    if opened and parts:
        raise _invalid("a whole pdf stands alone; give a page to put it beside other media.")
    if text:
        parts.append(Text(text))
    content = Content(tuple(parts))
    if content.empty and not opened:
        raise _invalid("neither text nor image nor video nor pdf is given.")
    files = [*names, *([video] if video else []), *([pdf] if pdf else [])]
    id = row.get("id", files[0] if files else None)
    if not isinstance(id, str) or not id:
        raise _invalid("id is missing; a document without a file needs one.")
    if "id" not in row and page is not None:
        id = page_id(id, page)
    return Line(number, id, content, metadata(row.get("metadata", {}), "metadata"), opened)


def page_id(id: str, page: int) -> str:
    """The id of one page of the PDF `id`, counted from 1."""
    return f"{id}#page={page}"


def metadata(fields: Any, where: str) -> dict[str, MetadataValue]:
    """`fields` when they can be metadata; raises InvalidInputError."""
    if not isinstance(fields, dict) or not all(
        isinstance(value, str | int | float | bool) for value in fields.values()
    ):
        raise InvalidInputError(
            f"{where} must be an object whose values are texts, numbers, true or false.",
            reason="INVALID_METADATA",
        )
    return fields


def parse_json(data: bytes, where: str) -> Any:
    """Raises InvalidInputError that names `where`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} is not JSON: {error}.", reason="INVALID_JSON") from None


def _invalid(message: str) -> InvalidInputError:
    return InvalidInputError(message, reason="INVALID_MANIFEST")
