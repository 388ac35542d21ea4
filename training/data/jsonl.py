"""Examples in JSON lines, one object a line:

    {"key": "q1", "dataset": "birds", "group": "owl",
     "query": {"text": "an owl", "instruction": "Find the picture.", "ecr": "<think>…"},
     "positives": [{"images": ["owl.png"], "ecr": "…"}],
     "negatives": [{"images": ["hawk.png"]}], "negative_scores": [0.2], "positive_score": 0.9}

A side is an object with `text`, `images`, `videos` (a file or a folder of frames), `pages`
(`{"path": "a.pdf", "page": 3}`), `instruction` and `ecr`, or just a string, which is its text.
`key` defaults to the line's number, `dataset` to the file's name. Paths are relative to the file's
folder unless another is given.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.data.rows import Item, MediaFile, Row, RowSource
from tte_jax.content import MediaKind
from tte_jax.errors import InvalidInputError, NotFoundError

_SIDE = {"text", "images", "videos", "pages", "instruction", "ecr"}
_ROW = {
    "key", "dataset", "group", "query", "positives", "negatives", "negative_scores",
    "positive_score",
}  # fmt: skip


class JsonlSource(RowSource):
    """Random access to the lines of a file; empty lines are left out.

    Args:
      path: the file. It is mapped, and one number a line is kept in memory.
      media: folder that paths are relative to; None = the file's own.
      dataset: for rows that name none; "" = the file's name without its ending.

    Raises:
      NotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, *, media: Path | None = None, dataset: str = "") -> None:
        self.path = Path(path)
        self._media = media if media is not None else self.path.parent
        self._dataset = dataset or self.path.stem
        try:
            with self.path.open("rb") as file:
                size = self.path.stat().st_size
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                starts, lines, at = [], [], 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        starts.append((at, at + len(line)))
                        lines.append(number)
                    at += len(line)
        except OSError as error:
            raise NotFoundError(
                f"{self.path} cannot be read ({error.strerror}): expected a file of JSON lines",
                path=self.path,
            ) from None
        self._spans = np.array(starts, np.int64).reshape(-1, 2)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, asked for row {index}")
        start, end = self._spans[index]
        where = f"{self.path}:{self._lines[index]}"
        try:
            value = json.loads(self._bytes[start:end])
        except ValueError as error:
            raise InvalidInputError(f"{where} is not JSON: {error}", field=where) from None
        return self._row(value, where, int(self._lines[index])).check(where)

    def _row(self, value: Any, where: str, number: int) -> Row:
        _object(value, where, _ROW)
        scores = _sequence(value, "negative_scores", where)
        positive = value.get("positive_score")
        return Row(
            key=str(value.get("key", number)),
            dataset=str(value.get("dataset") or self._dataset),
            query=self._item(value.get("query", ""), f"{where}: query"),
            positives=self._items(value.get("positives"), f"{where}: positives"),
            negatives=self._items(value.get("negatives"), f"{where}: negatives"),
            negative_scores=tuple(_number(s, f"{where}: negative_scores") for s in scores),
            positive_score=(
                None if positive is None else _number(positive, f"{where}: positive_score")
            ),
            group=str(value.get("group") or ""),
        )

    def _items(self, values: Any, where: str) -> tuple[Item, ...]:
        if values is None:
            return ()
        if not isinstance(values, list):
            raise InvalidInputError(f"{where}: expected a list, got {type(values).__name__}")
        return tuple(self._item(v, f"{where}[{i}]") for i, v in enumerate(values))

    def _item(self, value: Any, where: str) -> Item:
        if isinstance(value, str):
            return Item(value)
        _object(value, where, _SIDE)
        media = [self._file(p, MediaKind.IMAGE, where) for p in _sequence(value, "images", where)]
        media += [self._file(p, MediaKind.VIDEO, where) for p in _sequence(value, "videos", where)]
        for page in _sequence(value, "pages", where):
            _object(page, f"{where}.pages", {"path", "page"})
            number = page.get("page", 0)
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise InvalidInputError(
                    f"{where}.pages: expected page to be a whole number from 0, got {number!r}"
                )
            media.append(self._file(page.get("path"), MediaKind.PAGE, where, number))
        return Item(
            text=str(value.get("text") or ""),
            media=tuple(media),
            instruction=str(value.get("instruction") or ""),
            ecr=str(value.get("ecr") or ""),
        )

    def _file(self, path: Any, kind: MediaKind, where: str, page: int = 0) -> MediaFile:
        if not isinstance(path, str) or not path:
            raise InvalidInputError(f"{where}: expected a path, got {path!r}")
        return MediaFile(self._media / path, kind, page)


def _object(value: Any, where: str, known: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{where}: expected an object, got {type(value).__name__}")
    if unknown := set(value) - known:
        raise InvalidInputError(
            f"{where}: unknown {_list(unknown)}; known are {_list(known)}", field=where
        )


def _sequence(value: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    found = value.get(name)
    if found is not None and not isinstance(found, list):
        raise InvalidInputError(f"{where}: expected {name} to be a list, got {found!r}")
    return found or ()


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"{where}: expected a number, got {value!r}")
    return float(value)


def _list(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(repr(n) for n in names))
