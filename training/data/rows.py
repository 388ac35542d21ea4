"""Rows: examples whose media are still names of files.

A row is cheap to read, so that a whole data set can be checked before a run. `load` opens the
media and makes the `Example`. Every source of rows (`RowSource`) is a source of examples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from training.data.examples import Document, Example
from tte_jax.content import Content, Media, MediaKind, Part, Text
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError
from tte_jax.evaluation.mmeb_v2.frames import frame_paths, video_content

FRAMES_SHOWN = 8


class ExampleSource(Protocol):
    """Random access to examples; the same index always gives the same example."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class DocumentAccess(Protocol):
    """A source that can open one document alone."""

    def document(self, index: int, at: int) -> Document: ...


@dataclass(frozen=True)
class MediaFile:
    """Media by name, or with its bytes at hand.

    Attributes:
      path: an image, a video, a PDF, or a folder of a video's frames; None = `data` holds it.
      page: zero-based page of a PDF.
    """

    path: Path | None
    kind: MediaKind = MediaKind.IMAGE
    page: int = 0
    data: bytes | None = None

    @property
    def there(self) -> bool:
        """Whether it can be opened: a file that is not empty, or a folder with frames."""
        if self.path is None:
            return bool(self.data)
        if self.kind is MediaKind.VIDEO and self.path.is_dir():
            return bool(frame_paths(self.path))
        return self.path.is_file() and self.path.stat().st_size > 0

    def load(self) -> Media:
        """Raises NotFoundError for a file that is missing, DataLossError for an empty one."""
        if self.path is None:
            return Media(self.data or b"", self.kind, self.page)
        if self.kind is MediaKind.VIDEO and self.path.is_dir():
            frames = frame_paths(self.path, FRAMES_SHOWN)
            if not frames:
                raise NotFoundError(
                    f"{self.path} holds no frames: expected *.jpg or *.png. Unpack its archive.",
                    reason="MISSING_MEDIA",
                    path=self.path,
                )
            return video_content(frames).media[0]
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise NotFoundError(
                f"the file {self.path} cannot be read ({error.strerror}). Unpack the data set's "
                "media, or name their folder.",
                reason="MISSING_MEDIA",
                path=self.path,
            ) from None
        if not data:
            raise DataLossError(f"the file {self.path} is empty. Unpack it again.", path=self.path)
        return Media(data, self.kind, self.page)


@dataclass(frozen=True)
class Item:
    """One side of a row: media first, then the text."""

    text: str = ""
    media: tuple[MediaFile, ...] = ()
    instruction: str = ""
    ecr: str = ""

    @property
    def empty(self) -> bool:
        return not self.text.strip() and not self.media

    @property
    def name_key(self) -> str:
        """A hash over texts and names of files; equal to another's only where the content is
        equal, unless two files are copies. It costs no reading, unlike `Document.key`."""
        h = hashlib.sha256(f"{len(self.text)}:{self.text}".encode())
        for one in self.media:
            inline = hashlib.sha256(one.data).hexdigest() if one.data is not None else ""
            h.update(f"|{one.kind}:{one.page}:{one.path}:{inline}".encode())
        return h.hexdigest()

    def load(self) -> Document:
        parts: list[Part] = [one.load() for one in self.media]
        if self.text:
            parts.append(Text(self.text))
        return document(Content(tuple(parts)), instruction=self.instruction, ecr=self.ecr)


@dataclass(frozen=True)
class Row:
    """As `Example`, with items in place of documents."""

    key: str
    dataset: str
    query: Item
    positives: tuple[Item, ...]
    negatives: tuple[Item, ...] = ()
    negative_scores: tuple[float, ...] = ()
    positive_score: float | None = None
    group: str = ""

    def check(self, where: str) -> Row:
        """The row itself; raises InvalidInputError for what no trainer could use."""
        if not self.key:
            raise InvalidInputError(f"{where}: the key is empty", field="key")
        if self.query.empty:
            raise InvalidInputError(f"{where}: the query has neither text nor media", field="query")
        if not self.positives:
            raise InvalidInputError(f"{where}: there is no positive", field="positives")
        for name, items in (("positives", self.positives), ("negatives", self.negatives)):
            for i, item in enumerate(items):
                if item.empty:
                    raise InvalidInputError(
                        f"{where}: {name}[{i}] has neither text nor media", field=f"{name}[{i}]"
                    )
        if self.negative_scores and len(self.negative_scores) != len(self.negatives):
            raise InvalidInputError(
                f"{where}: {len(self.negative_scores)} negative_scores for "
                f"{len(self.negatives)} negatives; give one for each, or none",
                field="negative_scores",
            )
        return self

    def load(self) -> Example:
        """Reads the media. Raises NotFoundError, DataLossError."""
        return Example(
            key=self.key,
            dataset=self.dataset,
            query=self.query.load(),
            positives=tuple(item.load() for item in self.positives),
            negatives=tuple(item.load() for item in self.negatives),
            negative_scores=self.negative_scores,
            positive_score=self.positive_score,
            group=self.group,
        )


class RowSource:
    """A source of examples over rows; subclasses give `__len__` and `row`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> Row:
        """Raises InvalidInputError when the row cannot be used, IndexError outside the source."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        return self.row(index).load()

    def document(self, index: int, at: int) -> Document:
        """Document `at` of an example alone: its positives, then its negatives, from 0."""
        row = self.row(index)
        return (*row.positives, *row.negatives)[at].load()


def pick(source: ExampleSource, index: int, at: int) -> Document:
    """Document `at` of an example, without opening the other media where the source can."""
    if isinstance(source, DocumentAccess):
        return source.document(index, at)
    example = source[index]
    return (*example.positives, *example.negatives)[at]


def document(content: Content, *, instruction: str = "", ecr: str = "") -> Document:
    """A document keyed by its content's hash."""
    return Document(content.content_hash, content, instruction, ecr)
