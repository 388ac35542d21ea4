"""Examples in Arrow and Parquet files, as Hugging Face data sets lie on disk.

Arrow files (what `datasets` saves) are memory-mapped. Parquet cannot be read at a random row, so
each file is written once as Arrow into a cache and mapped from there. `datasets` itself is not
needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.rows import Item, MediaFile, Row, RowSource
from tte_jax.content import MediaKind
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "" = none does. Columns that a data set lacks are left out, but
    the query and the positive must each have text or an image.

    An image is a path, a list of paths, or Hugging Face's `{"bytes", "path"}`. Texts of positives
    and negatives may be lists: then each entry is a document, with the image beside it.
    """

    query: str = "query"
    query_image: str = "query_image"
    query_instruction: str = "query_instruction"
    query_ecr: str = "query_ecr"
    positive: str = "positive"
    positive_image: str = "positive_image"
    positive_instruction: str = "positive_instruction"
    positive_ecr: str = "positive_ecr"
    negative: str = "negative"
    negative_image: str = "negative_image"
    negative_ecr: str = "negative_ecr"
    key: str = "key"
    group: str = "group"


class ColumnSource(RowSource):
    """Rows of a table on disk, by columns.

    Args:
      files: Arrow or Parquet files, in order; see `data_files`.
      dataset: name of the data set.
      columns: which column holds what.
      media: folder that paths of images are relative to.
      limit: only the first so many rows; 0 = all.
      strip: a placeholder for an image that is removed from texts.
      skip_empty: leave out rows whose query or positive is empty, as the published trainer does;
        otherwise reading one raises.
      cache: where Parquet becomes Arrow; None = `$TTE_CACHE`, else `~/.cache/tte`.

    Raises:
      NotFoundError: a file is not there.  DataLossError: it cannot be read.
      InvalidInputError: the table has none of the columns that are needed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        dataset: str,
        *,
        columns: Columns | None = None,
        media: Path | None = None,
        limit: int = 0,
        strip: str = "",
        skip_empty: bool = False,
        cache: Path | None = None,
    ) -> None:
        self._columns = columns or Columns()
        self._dataset, self._strip = dataset, strip
        self._media = media if media is not None else Path(files[0]).parent
        self._tables = [_open(Path(file), cache) for file in files]
        self._starts = np.cumsum([0, *(t.num_rows for t in self._tables)])
        names = set(self._tables[0].schema.names)
        self._has = {f: c for f, c in vars(self._columns).items() if c and c in names}
        for side in ("query", "positive"):
            if not {side, f"{side}_image"} & set(self._has):
                wanted = getattr(self._columns, side), getattr(self._columns, f"{side}_image")
                raise InvalidInputError(
                    f"{files[0]}: there is neither a column {wanted[0]!r} nor {wanted[1]!r}; it "
                    f"has {', '.join(sorted(names))}",
                    field=side,
                )
        total = int(self._starts[-1])
        self._rows = np.arange(min(total, limit) if limit else total)
        if skip_empty:
            self._rows = np.array([i for i in self._rows if not self._is_empty(int(i))], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._dataset} has {len(self)} rows, asked for row {index}")
        number = int(self._rows[index])
        return self._row(number).check(f"{self._dataset}, row {number}")

    def _is_empty(self, number: int) -> bool:
        row = self._row(number)
        return row.query.empty or not row.positives or row.positives[0].empty

    def _row(self, number: int) -> Row:
        values = self._values(number)
        positives = self._items(values, "positive")
        return Row(
            key=str(values.get("key") or number),
            dataset=self._dataset,
            query=(self._items(values, "query") or (Item(),))[0],
            # An empty entry of a list of negatives is how published files say "none".
            positives=positives,
            negatives=tuple(i for i in self._items(values, "negative") if not i.empty),
            group=str(values.get("group") or ""),
        )

    def _values(self, number: int) -> dict[str, Any]:
        table = int(np.searchsorted(self._starts, number, "right")) - 1
        at = number - int(self._starts[table])
        source = self._tables[table]
        return {field: source.column(name)[at].as_py() for field, name in self._has.items()}

    def _items(self, values: Mapping[str, Any], side: str) -> tuple[Item, ...]:
        texts, images = values.get(side), values.get(f"{side}_image")
        several = isinstance(texts, list) or (side != "query" and isinstance(images, list))
        if not several:
            item = self._item(values, side, texts, images, values.get(f"{side}_ecr"))
            return () if item.empty and side != "query" else (item,)
        count = max(len(values) for values in (texts, images) if isinstance(values, list))
        ecrs = values.get(f"{side}_ecr")
        return tuple(
            self._item(values, side, *(_entry(v, i) for v in (texts, images, ecrs)))
            for i in range(count)
        )

    def _item(self, values: Mapping[str, Any], side: str, text: Any, image: Any, ecr: Any) -> Item:
        said = str(text or "")
        if self._strip:
            said = said.replace(self._strip, "").strip()
        images = image if isinstance(image, list) else [image]
        return Item(
            text=said,
            media=tuple(self._file(one) for one in images if _is_there(one)),
            instruction=str(values.get(f"{side}_instruction") or ""),
            ecr=str(ecr or ""),
        )

    def _file(self, image: Any) -> MediaFile:
        if isinstance(image, Mapping):
            if image.get("bytes"):
                return MediaFile(None, MediaKind.IMAGE, data=image["bytes"])
            image = image["path"]
        return MediaFile(self._media / str(image), MediaKind.IMAGE)


def _entry(values: Any, index: int) -> Any:
    if not isinstance(values, list):
        return values
    return values[index] if index < len(values) else None


def _is_there(image: Any) -> bool:
    if isinstance(image, Mapping):
        return bool(image.get("bytes") or image.get("path"))
    return bool(image)


def data_files(folder: Path, split: str = "train", subset: str = "") -> list[Path]:
    """The files of a split of a data set on disk, in order.

    Looked for, in the folder of the subset where there is one: what `save_to_disk` wrote (a
    `state.json` naming its Arrow files, or a folder for each split), then `SPLIT.parquet`,
    `SPLIT-*.parquet`, numbered ones (`SPLIT_0.parquet`) and the same in `.arrow`, here and below
    `data/`, and whatever lies in `SPLIT/`.

    Raises:
      NotFoundError: there are none.
    """
    tried: list[str] = []
    for base in ([folder / subset, folder / "data" / subset] if subset else []) + [folder]:
        for place in (base / split, base):
            tried.append(str(place))
            if (state := place / "state.json").is_file():
                named = json.loads(state.read_text())["_data_files"]
                return [place / entry["filename"] for entry in named]
            folders = [place] if place.name == split else [place, place / "data"]
            for one in folders:
                found = sorted(p for s in ("parquet", "arrow") for p in one.glob(f"*.{s}"))
                if one.name != split:
                    # Not `train_hard-…` for `train`.
                    mine = re.compile(re.escape(split) + r"(-.*|[._ ]?\d.*)?\.(parquet|arrow)")
                    found = [p for p in found if mine.fullmatch(p.name)]
                if found:
                    return found
    raise NotFoundError(
        f"{folder} holds no split {split!r}{f' of {subset!r}' if subset else ''} in Arrow or "
        f"Parquet files. Looked in {', '.join(tried)}.",
        reason="MISSING_DATA",
    )


def _open(path: Path, cache: Path | None) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            path = _as_arrow(path, cache)
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise NotFoundError(f"the file {path} is not there", reason="MISSING_DATA") from None
    except (pa.ArrowException, OSError) as error:
        raise DataLossError(
            f"{path} cannot be read ({error}). Download it again.", reason="UNREADABLE_DATA"
        ) from error


def _as_arrow(path: Path, cache: Path | None) -> Path:
    """The file as Arrow, written once; another file at the same path gets another name."""
    stat = path.stat()
    name = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    root = cache or Path(os.environ.get("TTE_CACHE") or Path.home() / ".cache/tte") / "arrow"
    target = root / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.partial")
        with pq.ParquetFile(path) as file, pa.OSFile(str(part), "wb") as sink:
            with pa.ipc.new_stream(sink, file.schema_arrow) as writer:
                for batch in file.iter_batches(batch_size=1024):
                    writer.write_batch(batch)
        os.replace(part, target)
    return target
