"""Where a data set's files lie below the data folder, and their rows.

A repository `org/name` is looked for as `org/name`, `name`, and as the Hugging Face cache writes it
(`datasets--org--name/snapshots/…`, also below `hub/`). Inside, the files of a config and split are
those that the README's header names, else those that lie where the hub's conventions put them.
Parquet, Arrow (as `datasets` saves to disk) and JSON lines are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tte_jax.errors import DataLossError, NotFoundError
from tte_jax.evaluation.mmeb_v2.registry import DatasetInfo
from tte_jax.json_lines import json_lines

ROOT_REPO = "TIGER-Lab/MMEB-V2"
_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
_NOT_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")


@dataclass(frozen=True)
class Missing:
    """Something that a task needs and that is not there.

    Attributes:
      what: for people.
      looked_in: every place that was tried.
      get: a command that fetches it.
    """

    task: str
    what: str
    looked_in: tuple[str, ...]
    get: str

    def sentence(self) -> str:
        return f"{self.task}: {self.what}. Looked in {', '.join(self.looked_in)}. Get: {self.get}"


class MissingDataError(NotFoundError):
    """Files of a data set are not there; `missing` says which, and how to get them."""

    default_reason = "MISSING_DATA"

    def __init__(self, missing: Sequence[Missing]) -> None:
        super().__init__("\n".join(m.sentence() for m in missing))
        self.missing = tuple(missing)


def missing(info: DatasetInfo, root: Path) -> list[Missing]:
    """What of a data set's rows and media folder is not below `root`; nothing is opened."""
    found: list[Missing] = []
    for config in configs(info):
        try:
            row_files(info, config, root)
        except MissingDataError as error:
            found += error.missing
    if info.media and media_root(info, root) is None:
        found.append(
            Missing(
                info.name,
                f"the folder {info.media} of its {'frames' if info.frames else 'images'}",
                tuple(str(p / info.media) for p in _media_places(root)),
                _download(ROOT_REPO, root, f"{info.media.split('/')[0]}/*")
                + " (then unpack the archives in place)",
            )
        )
    return found


def configs(info: DatasetInfo) -> tuple[str, ...]:
    """The configs to read: the data set's own, or those of a BEIR-style set."""
    return ("queries", "qrels", "corpus") if not info.media else info.configs or ("",)


def media_root(info: DatasetInfo, root: Path) -> Path | None:
    """The folder of a data set's images or frames; None = it is not there."""
    return next((p / info.media for p in _media_places(root) if (p / info.media).is_dir()), None)


def _media_places(root: Path) -> list[Path]:
    return [root, *_repo_places(ROOT_REPO, root)]


def _repo_places(repo: str, root: Path) -> list[Path]:
    places = [root / repo, root / repo.split("/")[-1]]
    for base in (root, root / "hub"):
        snapshots = base / f"datasets--{repo.replace('/', '--')}" / "snapshots"
        if snapshots.is_dir():
            places += sorted(snapshots.iterdir())
    # One of several layouts that the authors' own scripts use.
    return places + [root / f"{kind}-tasks" / repo.split("/")[-1] for kind in ("video", "visdoc")]


def _download(repo: str, root: Path, include: str = "") -> str:
    pattern = f" --include '{include}'" if include else ""
    return f"hf download --repo-type dataset {repo}{pattern} --local-dir {root / repo}"


def row_files(info: DatasetInfo, config: str, root: Path) -> list[Path]:
    """The files of a data set's rows, in order. Raises MissingDataError."""
    places = _repo_places(info.repo, root)
    for place in places:
        if place.is_dir() and (files := _files(place, config, info.split)):
            return files
    named = f" of config {config!r}" if config else ""
    raise MissingDataError(
        [
            Missing(
                info.name,
                f"the rows{named}, split {info.split!r}, of {info.repo}",
                tuple(str(p) for p in places),
                _download(info.repo, root),
            )
        ]
    )


def _files(place: Path, config: str, split: str) -> list[Path]:
    for pattern in _declared(place, config, split):
        if found := _with_rows(place.glob(pattern)):
            return found
    folders = [place / config] if config else [place, place / "data", place / "default"]
    folders += [place / "data" / config] if config else []
    for folder in folders:
        for pattern in (f"{split}-*", f"{split}.*", f"{split}/*", f"{config}_{split}*"):
            if found := _with_rows(folder.glob(pattern)):
                return found
    # A folder of Arrow files with no split in their names is one split saved by itself.
    for folder in folders:
        if (folder / "state.json").is_file() and (found := _with_rows(folder.glob("*.arrow"))):
            return found
    return []


def _with_rows(paths: Iterator[Path]) -> list[Path]:
    return sorted(
        p for p in paths if p.suffix in _SUFFIXES and p.is_file() and p.name not in _NOT_ROWS
    )


def _declared(place: Path, config: str, split: str) -> list[str]:
    """Patterns that the header of the repository's README gives for a config and split."""
    readme = place / "README.md"
    if not readme.is_file():
        return []
    parts = readme.read_text("utf-8", errors="replace").split("---")
    if len(parts) < 3 or parts[0].strip():
        return []
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return []
    patterns: list[str] = []
    for entry in (header or {}).get("configs") or []:
        if config and entry.get("config_name") != config:
            continue
        files = entry.get("data_files") or []
        for file in files if isinstance(files, list) else [files]:
            # The hub takes a path by itself for one of the split `train`.
            named = file if isinstance(file, dict) else {"split": "train", "path": file}
            if named.get("split") == split:
                path = named.get("path")
                patterns += path if isinstance(path, list) else [str(path)]
    return patterns


def read_rows(
    info: DatasetInfo, root: Path, *, config: str = "", columns: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, a batch of files' rows in memory at a time.

    Args:
      columns: must all be there; only they are read.

    Raises:
      MissingDataError: there are no files.
      DataLossError: a file cannot be read, or lacks a column.
    """
    for path in row_files(info, config, root):
        try:
            yield from _rows(path, columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataLossError(
                f"{info.name}: {path} cannot be read ({error}). Download it again.",
                reason="UNREADABLE_DATA",
            ) from error


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            _check(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=64, columns=list(columns) or None):
                yield from batch.to_pylist()
    elif path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            with pa.ipc.open_stream(source) as reader:
                _check(path, columns, reader.schema.names)
                for batch in reader:
                    chosen = batch.select(list(columns)) if columns else batch
                    yield from chosen.to_pylist()
    else:
        text = path.read_text("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else None
        lines = rows if rows is not None else (json.loads(x) for x in json_lines(text) if x.strip())
        for row in lines:
            _check(path, columns, list(row))
            yield row


def _check(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(
            f"it has no column {', '.join(map(repr, lacking))}; it has {', '.join(found)}"
        )
