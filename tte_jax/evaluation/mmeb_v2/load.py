"""A data set of the benchmark as an `EvalTask`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.evaluation.mmeb_v2 import image, moments, video, visdoc
from tte_jax.evaluation.mmeb_v2.files import Missing, missing
from tte_jax.evaluation.mmeb_v2.reading import Source
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DatasetInfo, Layout
from tte_jax.evaluation.task import EvalTask

_READERS: Mapping[Layout, Callable[[Source], EvalTask]] = {
    Layout.IMAGE_TO_TEXT: image.read,
    Layout.TEXT_TO_IMAGE: image.read,
    Layout.IMAGE_TO_IMAGE: image.read,
    Layout.BEIR: visdoc.read,
    Layout.VIDEO_CLASSES: video.read_classes,
    Layout.VIDEO_CAPTIONS: video.read_captions,
    Layout.VIDEO_QA: video.read_questions,
    Layout.MOMENT_FOLDERS: moments.read_folders,
    Layout.MOMENT_LISTS: moments.read_lists,
}

Instructions = Mapping[str, Mapping[str, str]]
"""Task → {"query": …, "target": …}; what is not named stays as it is."""


def load(
    info: DatasetInfo,
    root: Path,
    *,
    limit: int = 0,
    frames: int = 8,
    instructions: Instructions | None = None,
) -> EvalTask:
    """Reads a data set's rows; media are read when they are needed.

    Args:
      limit: only the first so many queries; 0 = all. The pool stays whole.
      frames: how many frames of a video are looked at.

    Raises:
      MissingDataError: files are not there; says which and how to get them.
      DataLossError: a file is not what it should be.
    """
    own = (instructions or {}).get(info.name, {})
    return _READERS[info.layout](
        Source(
            info,
            root,
            own.get("query", info.query_instruction),
            own.get("target", info.target_instruction),
            limit,
            frames,
        )
    )


def what_is_missing(infos: Sequence[DatasetInfo], root: Path) -> list[Missing]:
    """All that `infos` need and `root` does not have, seen without opening anything."""
    return [lack for info in infos for lack in missing(info, root)]


def read_instructions(path: Path) -> Instructions:
    """The file of `--instructions`: JSON, {task: {"query": text, "target": text}}.

    Raises NotFoundError without the file, InvalidInputError when it holds something else.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no instructions file {path}.", reason="FILE_NOT_FOUND")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path} is not JSON: {error}.", field="--instructions") from None
    shape = '{"MSVD": {"query": "…", "target": "…"}}'
    if not isinstance(found, dict):
        raise InvalidInputError(f"{path} must look like {shape}.", field="--instructions")
    for name, sides in found.items():
        if name not in BY_NAME:
            raise InvalidInputError(
                f"{path}: {name!r} is no data set of MMEB-V2; see `tte eval mmeb-v2 --list`.",
                field="--instructions",
            )
        good = isinstance(sides, dict) and all(
            side in ("query", "target") and isinstance(text, str) for side, text in sides.items()
        )
        if not good:
            raise InvalidInputError(
                f"{path}: {name} must have texts under query and target, as in {shape}.",
                field="--instructions",
            )
    return found
