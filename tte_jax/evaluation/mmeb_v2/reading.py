"""What all readers share: collecting candidates by name, loading files late, naming what lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tte_jax.content import Content
from tte_jax.evaluation.mmeb_v2.files import Missing, MissingDataError, media_root, missing
from tte_jax.evaluation.mmeb_v2.registry import DatasetInfo
from tte_jax.evaluation.task import EvalTask, Item, Query

NAMED = 5


@dataclass(frozen=True)
class Source:
    """A data set and how it is to be read.

    Attributes:
      root: the data folder.
      query_instruction, target_instruction: of this run.
      limit: only the first so many queries; 0 = all.
      frames: how many frames of a video are looked at.
    """

    info: DatasetInfo
    root: Path
    query_instruction: str
    target_instruction: str
    limit: int = 0
    frames: int = 8

    @property
    def media(self) -> Path:
        found = media_root(self.info, self.root)
        if found is None:
            raise MissingDataError(missing(self.info, self.root))
        return found

    def first(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return islice(rows, self.limit or None)


@dataclass
class Gathered:
    """Queries and candidates while they are read.

    Attributes:
      items: by name, in the order in which they were met; the first of a name counts.
      lacking: media files that are not there.
    """

    queries: list[Query] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    lacking: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, load: Callable[[], Content], instruction: str = "") -> None:
        if name not in self.items:
            self.items[name] = Item(name, load, instruction)

    def need(self, path: Path) -> Path:
        """Notes a media file that is not there."""
        if not path.is_file():
            self.lacking[str(path)] = None
        return path

    def task(self, source: Source) -> EvalTask:
        """Raises MissingDataError when files lack."""
        if self.lacking:
            raise MissingDataError([lacking(source, list(self.lacking))])
        items = tuple(self.items.values())
        return make_task(source, self.queries, lambda: iter(items), self.notes)


def make_task(
    source: Source,
    queries: list[Query],
    candidates: Callable[[], Iterator[Item]],
    notes: list[str],
) -> EvalTask:
    info = source.info
    return EvalTask(
        name=info.name,
        modality=str(info.modality),
        metric=info.metric,
        queries=tuple(queries),
        candidates=candidates,
        ecr_query=info.ecr_query,
        ecr_target=info.ecr_target,
        frames=source.frames if info.frames else 0,
        notes=tuple(notes),
    )


def lacking(source: Source, paths: list[str]) -> Missing:
    """Media files that the rows name and that are not there."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return Missing(
        source.info.name,
        f"{len(paths)} media files that its rows name: {', '.join(paths[:NAMED])}{more}",
        (str(source.media),),
        f"unpack the archives of TIGER-Lab/MMEB-V2 for {source.info.media} again",
    )


def text_of(text: str) -> Callable[[], Content]:
    return partial(Content.of, text)


def picture(path: Path, text: str = "") -> Callable[[], Content]:
    """An image file, read when called, and a text."""
    return lambda: Content.of(text.strip(), path.read_bytes())
