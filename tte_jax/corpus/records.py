"""What the corpus stores, as values, and their form in the database's columns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tte_jax.content import MediaKind, Metadata, Reasoning, Text
from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.stages import IndexEntry

MAX_ID_BYTES = 1024
# A float32 vector normalised anywhere is within 1e-6; one that went through bfloat16 within 1e-3.
NORM_TOLERANCE = 1e-3

_LITTLE_F32 = np.dtype("<f4")


@dataclass(frozen=True)
class MediaRef:
    """A media part by hash and size in bytes; the content is in the media store."""

    sha256: str
    size: int
    kind: MediaKind
    page: int = 0


@dataclass(frozen=True)
class StoredDocument:
    """A document as its row has it, media by reference."""

    id: str
    sequence: int
    content_hash: str
    parts: tuple[Text | MediaRef, ...]
    metadata: Metadata
    reasoning: Reasoning
    reasoner_version: str
    embedder_version: str


@dataclass(frozen=True)
class CorpusProfile:
    """What all vectors of a corpus share."""

    dimension: int
    embedder_version: str


class Stored(NamedTuple):
    """A live document in the op-log: what the index needs of it. `vector` is [D] float32."""

    sequence: int
    id: str
    vector: np.ndarray
    metadata: Metadata


class Removed(NamedTuple):
    """A deletion in the op-log."""

    sequence: int
    id: str


Change = Stored | Removed


def validate(entries: Sequence[IndexEntry]) -> None:
    """Refuse what cannot be stored faithfully.

    Raises:
      InvalidInputError: a bad id, text that is not Unicode, metadata of another type than str,
        int, finite float or bool, or a vector that is not a finite, L2-normalised [D] array.
    """
    for i, entry in enumerate(entries):
        where = f"entries[{i}]"
        validate_id(entry.document.id, f"{where}.document.id")
        for key, value in entry.document.metadata.items():
            _check_metadata(key, value, f"{where}.document.metadata")
        reasoning = entry.document.reasoning
        texts = [p.text for p in entry.document.content.parts if isinstance(p, Text)]
        texts += [reasoning.text, reasoning.think, reasoning.answer]
        texts += [entry.reasoner_version, entry.embedder_version]
        for text in texts:
            _check_unicode(text, f"{where}.document")
        check_vector(entry.vector, f"{where}.vector")


def validate_id(id: str, field: str) -> None:
    _check_unicode(id, field)
    size = len(id.encode())
    if not 0 < size <= MAX_ID_BYTES or "\0" in id:
        raise InvalidInputError(
            f"{field} must have 1 to {MAX_ID_BYTES} bytes of UTF-8 without NUL, got {size} bytes",
            field=field,
        )


def check_vector(vector: np.ndarray, field: str) -> None:
    """Raise `InvalidInputError` unless `vector` is [D], finite and of unit length."""
    vector = np.asarray(vector)
    if vector.ndim != 1 or vector.size == 0 or vector.dtype.kind != "f":
        raise InvalidInputError(
            f"{field} must be one non-empty vector of floats, got shape {vector.shape} of "
            f"{vector.dtype}",
            field=field,
        )
    wide = vector.astype(np.float64)
    norm = math.sqrt(wide @ wide)
    if not abs(norm - 1.0) <= NORM_TOLERANCE:
        raise InvalidInputError(
            f"{field} must be finite and L2-normalised (length 1 within {NORM_TOLERANCE:g}), "
            f"got length {norm:.6g}. Divide it by its norm in float32.",
            field=field,
        )


def encode_vector(vector: np.ndarray) -> bytes:
    return np.ascontiguousarray(vector, dtype=_LITTLE_F32).tobytes()


def decode_vector(raw: bytes, dimension: int, id: str) -> np.ndarray:
    if len(raw) != dimension * _LITTLE_F32.itemsize:
        raise DataLossError(
            f"the stored vector of document {id!r} has {len(raw)} bytes, expected "
            f"{dimension * _LITTLE_F32.itemsize} for dimension {dimension}",
            id=id,
        )
    return np.frombuffer(raw, dtype=_LITTLE_F32).astype(np.float32)


def encode_parts(entry: IndexEntry) -> str:
    parts: list[dict[str, Any]] = []
    for part in entry.document.content.parts:
        if isinstance(part, Text):
            parts.append({"text": part.text})
        else:
            parts.append(
                {
                    "media": part.sha256,
                    "bytes": len(part.data),
                    "kind": part.kind.value,
                    "page": part.page,
                }
            )
    return json.dumps(parts)


def decode_parts(raw: str) -> tuple[Text | MediaRef, ...]:
    return tuple(
        Text(part["text"])
        if "text" in part
        else MediaRef(part["media"], part["bytes"], MediaKind(part["kind"]), part["page"])
        for part in json.loads(raw)
    )


def encode_metadata(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), sort_keys=True, allow_nan=False)


def decode_metadata(raw: str) -> Metadata:
    return json.loads(raw)


def decode_all_metadata(raw: Sequence[str]) -> list[Metadata]:
    """`decode_metadata` of each, in a third of the time."""
    return json.loads(f"[{','.join(raw)}]")


def _check_metadata(key: object, value: object, field: str) -> None:
    if not isinstance(key, str) or not key:
        raise InvalidInputError(f"{field} keys must be non-empty strings, got {key!r}", field=field)
    _check_unicode(key, field)
    if isinstance(value, str):
        _check_unicode(value, f"{field}[{key}]")
    elif not isinstance(value, bool | int | float) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise InvalidInputError(
            f"{field}[{key}] must be a string, a boolean, an integer or a finite number, got "
            f"{value!r}",
            field=f"{field}[{key}]",
        )


def _check_unicode(text: object, field: str) -> None:
    if not isinstance(text, str):
        raise InvalidInputError(f"{field} must be text, got {type(text).__name__}", field=field)
    if text.isascii():  # known without looking at it
        return
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInputError(
            f"{field} holds a lone surrogate, which is not valid Unicode", field=field
        ) from exc
