"""Where one task is made: its files are written and noted here, and its packages are at hand."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation.mini.packages import Archive
from tte_jax.evaluation.mmeb_v2.registry import DatasetInfo

JPEG_QUALITY = 90


class Workshop:
    """Makes one task below a data folder.

    Attributes:
      queries: how many the task shall have.
      pages: how many pages the pool of a page task shall have; 0 = all.
      packages: by name, those that the task said it needs.
      files: path below the folder → sha256, of all that the task is made of.
    """

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        *,
        queries: int,
        pages: int = 0,
        packages: Mapping[str, Archive] | None = None,
        known: Mapping[str, str] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """`known`: files that other tasks made before, by path, with their sha256."""
        self.folder, self.info = folder, info
        self.queries, self.pages = queries, pages
        self.packages = dict(packages or {})
        self.progress = progress
        self.files: dict[str, str] = {}
        self._known = dict(known or {})

    def at_most(self, count: int, what: str) -> None:
        """Raises InvalidInputError when there is too little for so many queries."""
        if self.queries > count:
            raise InvalidInputError(
                f"--queries is {self.queries}; there are {what} for at most {count} "
                f"({self.info.name}).",
                field="--queries",
            )

    def media(self, name: str, make: Callable[[], bytes]) -> str:
        """A file below the task's media folder; made only when no task has it. Returns `name`."""
        self._file(f"{self.info.media}/{name}", make)
        return name

    def frames(self, name: str, images: Iterable[Image.Image]) -> None:
        """A folder of JPEG frames, as published."""
        for number, image in enumerate(images):
            self.media(f"{name}/{number:04d}.jpg", lambda image=image: jpeg(image))

    def rows(self, rows: Iterable[Mapping[str, Any]], config: str = "") -> None:
        """A Parquet file of the rows of a config (else of the task's only one), in its split."""
        (config,) = [config] if config else self.info.configs or ("data",)
        name = f"{self.info.repo}/{config}/{self.info.split}-00000-of-00001.parquet"
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), out)
        self._file(name, out.getvalue)

    def _file(self, name: str, make: Callable[[], bytes]) -> None:
        if name in self.files:
            return
        path = self.folder / name
        if name in self._known and path.is_file():
            if sha256(path) != self._known[name]:
                raise DataLossError(
                    f"{path} is not what it was when another task made it. Delete {self.folder} "
                    "and build again.",
                    reason="UNREADABLE_DATA",
                )
            self.files[name] = self._known[name]
            return
        # What an interrupted build left is made again; a file appears only when it is whole.
        data = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".part")
        scratch.write_bytes(data)
        scratch.replace(path)
        self.files[name] = hashlib.sha256(data).hexdigest()


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
