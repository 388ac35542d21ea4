"""Tensors of safetensors files, found by name and read in parts.

Whatever its rank, a tensor is seen as a matrix: its first dimension makes the rows, the others the
columns. That is how PyTorch lays out the weight of a linear layer, [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy before safetensors reads it)
import numpy as np
from safetensors import SafetensorError, safe_open

from tte_jax.errors import DataLossError, NotFoundError, PreconditionError
from tte_jax.models.files import read_json
from tte_jax.weights.table import normalise

PIECE_VALUES = 4 * 2**20
"""Values of one read: all that loading holds beside the parameter that it fills."""

Run = tuple[int, int]
"""First and behind the last of neighbouring rows or columns."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: which file, under what name, of what shape."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def read(self, rows: Sequence[Run], columns: Sequence[Run], into: np.ndarray) -> None:
        """Copies those rows and columns, in order, to `into`, whose dtype they take.

        Only they are read. The file is mapped for as long as the call takes and no longer, since
        the pages that were read count as memory of this process until it is unmapped.

        Args:
          into: [rows, columns].

        Raises:
          DataLossError: the file cannot be read.
        """
        step = max(1, PIECE_VALUES // max(1, prod(self.shape[1:])))
        try:
            with safe_open(self.path, "np") as handle:
                tensor = handle.get_slice(self.key)
                for row, (begin, end) in _places(rows, step):
                    for column, (first, last) in _places(columns, prod(self.shape[1:]) or 1):
                        target = into[row : row + end - begin, column : column + last - first]
                        target[...] = self._part(tensor, begin, end, first, last)
        except SafetensorError as e:
            raise _damaged(self.path, e) from e

    def _part(self, tensor: Any, begin: int, end: int, first: int, last: int) -> np.ndarray:
        if len(self.shape) == 2:
            return tensor[begin:end, first:last]
        # A vector is one column; of a convolution's values whole rows are read.
        return tensor[begin:end].reshape(end - begin, -1)[:, first:last]


def tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of a model directory by their name in the weight table.

    Raises:
      NotFoundError: no weights, or files missing that the index names.
      PreconditionError: two files hold a tensor of one name, or the index is none.
      DataLossError: a file that cannot be read, or lacks what the index says it holds.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        shards = sorted(directory.glob("*.safetensors"))
        if not shards:
            raise NotFoundError(
                f"No *.safetensors in {str(directory)!r}. Weights in other formats must be"
                " converted to safetensors first.",
                reason="MODEL_WEIGHTS_NOT_FOUND",
            )
        return _by_name(t for shard in shards for t in _headers(shard, None))
    keys: dict[str, list[str]] = {}
    for key, file in _weight_map(index).items():
        keys.setdefault(file, []).append(key)
    if absent := sorted(file for file in keys if not (directory / file).is_file()):
        raise NotFoundError(
            f"{str(index)!r} names files that are not there: {', '.join(absent)}."
            " Download the model again.",
            reason="MODEL_WEIGHTS_NOT_FOUND",
        )
    return _by_name(t for file, named in keys.items() for t in _headers(directory / file, named))


def runs(shape: Sequence[int], chosen: Sequence[slice]) -> list[Run]:
    """The chosen part of an array as runs of neighbours in its flattened form.

    Of shape (3, 4, 2), [:, 1:3, :] is (2, 6), (10, 14), (18, 22).
    """
    found = [(0, 1)]
    for size, part in zip(shape, chosen, strict=True):
        start, stop, _ = part.indices(size)
        if (start, stop) == (0, size):
            found = [(begin * size, end * size) for begin, end in found]
        else:
            found = [
                (one * size + start, one * size + stop)
                for begin, end in found
                for one in range(begin, end)
            ]
    return found


def _places(all_runs: Sequence[Run], step: int) -> Iterator[tuple[int, Run]]:
    """The runs cut to at most `step`, each with its place in the part that they make."""
    place = 0
    for begin, end in all_runs:
        for one in range(begin, end, step):
            piece = (one, min(one + step, end))
            yield place, piece
            place += piece[1] - piece[0]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise PreconditionError(
            f"{str(index)!r} has no weight_map, an object of tensors and their files. Download the "
            "model again.",
            reason="BAD_MODEL_FILE",
            path=index,
        )
    return found


def _by_name(stored: Iterable[Stored]) -> dict[str, Stored]:
    """By the name in the weight table, which only one may have."""
    found: dict[str, Stored] = {}
    for tensor in stored:
        other = found.setdefault(normalise(tensor.key), tensor)
        if other is not tensor:
            raise PreconditionError(
                f"{other.key!r} of {str(other.path)!r} and {tensor.key!r} of {str(tensor.path)!r} "
                "are the same tensor. Keep the files of one model only, or the index that says "
                "which file has it (model.safetensors.index.json).",
                reason="MODEL_WEIGHTS_MISMATCH",
                tensor=tensor.key,
            )
    return found


def _headers(path: Path, keys: Sequence[str] | None) -> list[Stored]:
    """Tensors of one file; None = all. No values are read."""
    try:
        with safe_open(path, "np") as handle:
            named = handle.keys() if keys is None else keys
            return [Stored(path, k, tuple(handle.get_slice(k).get_shape())) for k in named]
    except SafetensorError as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, error: SafetensorError) -> DataLossError:
    return DataLossError(
        f"{str(path)!r} is damaged ({error}). Download the model again.",
        reason="MODEL_WEIGHTS_DAMAGED",
    )
