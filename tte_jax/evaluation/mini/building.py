"""Builds the tasks of a folder and its manifest; what is there already is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation.mini import packages
from tte_jax.evaluation.mini.packages import Note
from tte_jax.evaluation.mini.tasks import MiniTask
from tte_jax.evaluation.mini.workshop import Workshop, sha256

MANIFEST = "manifest.json"
# Of the manifest and of what the tasks hold: another number, and the folder is to be made anew.
FORMAT = 2

Progress = Callable[[str, int, int], None]
"""(task, done, 0)."""


def build(
    folder: Path,
    tasks: Sequence[MiniTask],
    *,
    queries: int,
    pages: int = 0,
    cache: Path | None = None,
    progress: Progress = lambda what, done, total: None,
    note: Note = lambda line: None,
) -> dict[str, Any]:
    """Makes the tasks that are not in the folder yet, and checks those that are.

    Args:
      queries: of each task.
      pages: the pool of a page task; 0 = all.
      cache: where downloaded packages are kept; default: `packages` in the folder.
      note: is told what is downloaded.

    Returns:
      The manifest: {"format", "tasks": {name: queries, pages, packages with versions, paths of its
      files}, "files": {path: sha256}}. It is written after every task, so that an interrupted
      build goes on.

    Raises:
      PreconditionError: a package is missing and could not be downloaded.
      InvalidInputError: more queries than the data have, or another set is in the folder.
      DataLossError: a file is not what the manifest says.
    """
    if queries < 2:
        raise InvalidInputError(f"--queries is {queries}; expected at least 2.", field="--queries")
    if pages < 0:
        raise InvalidInputError(
            f"--pages is {pages}; expected how many, or 0 for all.", field="--pages"
        )
    manifest = _manifest(folder)
    ready = [task for task in tasks if task.name in manifest["tasks"]]
    check(folder, manifest, [(task.name, _asked(task, queries, pages)) for task in ready])
    for task in tasks:
        if task in ready:
            continue
        got = [packages.get(p, cache or folder / "packages", note) for p in task.packages]
        shop = Workshop(
            folder,
            task.info,
            queries=queries,
            pages=pages,
            packages={archive.package.name: archive for archive in got},
            known=manifest["files"],
            progress=lambda done, task=task: progress(task.name, done, 0),
        )
        task.make(shop)
        manifest["tasks"][task.name] = {
            **_asked(task, queries, pages),
            "packages": {archive.package.name: archive.as_json() for archive in got},
            "files": sorted(shop.files),
        }
        manifest["files"] |= shop.files
        _write(folder / MANIFEST, manifest)
    return manifest


def check(
    folder: Path, manifest: dict[str, Any], wanted: Sequence[tuple[str, dict[str, int]]]
) -> None:
    """Whether tasks of a folder are what was asked for, and their files as the manifest says.

    Args:
      wanted: (task, its settings).

    Raises InvalidInputError, DataLossError.
    """
    for name, asked in wanted:
        there = manifest["tasks"][name]
        for key, value in asked.items():
            if there.get(key) != value:
                raise InvalidInputError(
                    f"{folder} holds {name} with {there.get(key)} {key}, and {value} were asked "
                    f"for; give another --data, or the same --{key}.",
                    field=f"--{key}",
                    reason="OTHER_SET",
                )
    for path in sorted({path for name, _ in wanted for path in manifest["tasks"][name]["files"]}):
        file = folder / path
        if not file.is_file() or sha256(file) != manifest["files"][path]:
            raise DataLossError(
                f"{file} is {'not what' if file.is_file() else 'missing, though'} {MANIFEST} says. "
                f"Delete {folder} and build again.",
                reason="UNREADABLE_DATA",
            )


def data_of(manifest: dict[str, Any], task: str) -> dict[str, Any]:
    """What a task's data are, for the settings of its results: the manifest's entry, with one
    sha256 over its files' in place of their paths."""
    entry = dict(manifest["tasks"][task])
    files = "".join(f"{manifest['files'][path]}  {path}\n" for path in entry.pop("files"))
    return entry | {"sha256": hashlib.sha256(files.encode()).hexdigest()}


def _asked(task: MiniTask, queries: int, pages: int) -> dict[str, int]:
    """The settings that a task depends on."""
    return {"queries": queries} | ({} if task.info.media else {"pages": pages})


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        return {"name": "mini-MMEB", "format": FORMAT, "tasks": {}, "files": {}}
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataLossError(
            f"{path} is not JSON ({error}). Delete {folder} and build again.",
            reason="UNREADABLE_DATA",
        ) from error
    if manifest.get("format") != FORMAT:
        raise DataLossError(
            f"{path} is of another version of these tasks ({manifest.get('format')}, expected "
            f"{FORMAT}). Delete {folder} and build again.",
            reason="OTHER_SET",
        )
    return manifest


def _write(path: Path, manifest: dict[str, Any]) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    scratch.replace(path)
