"""What `tte ingest` and `tte search` read from disk: images, folders and JSONL manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tte_jax import limits
from tte_jax.content import Content, Document, Metadata, MetadataValue
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.preprocess.image import decode_image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MANIFEST_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# A message carries the image and some metadata.
MAX_FILE_BYTES = limits.MAX_MESSAGE_BYTES - 2**20


@dataclass(frozen=True)
class BadSource:
    """A file or manifest line that could not become a document."""

    source: str
    message: str


@dataclass(frozen=True)
class Item:
    """A document and where it came from (a path, or "manifest.jsonl:12")."""

    source: str
    document: Document


@dataclass(frozen=True)
class MetadataRules:
    """Metadata from the command line.

    Attributes:
      shared: given to every document (`--metadata key=value`).
      by_file: given to one, by its path below the folder or its file name (`--metadata FILE`).
    """

    shared: Metadata
    by_file: Mapping[str, Metadata]

    def of(self, relative: str) -> dict[str, MetadataValue]:
        own = self.by_file.get(relative) or self.by_file.get(relative.rpartition("/")[2]) or {}
        return {**self.shared, **own}


def read_file(path: Path) -> bytes:
    """The bytes of a file that exists, is not empty and fits into a message.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise InvalidInputError(f"{path} is a folder; expected a file.", reason="NOT_A_FILE")
        if size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes).", reason="EMPTY_FILE")
        if size > MAX_FILE_BYTES:
            raise InvalidInputError(
                f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} can be sent. Make it "
                "smaller.",
                reason="FILE_TOO_LARGE",
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist.", reason="FILE_NOT_FOUND") from None
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error.strerror or error}.", reason="UNREADABLE_FILE"
        ) from error


def read_image(path: Path) -> bytes:
    """The bytes of an image file, decoded once to be sure of it.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    data = read_file(path)
    try:
        decode_image(data, max_pixels=limits.MAX_IMAGE_PIXELS)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.message}.", reason=error.reason) from None
    return data


def find(paths: Sequence[Path]) -> tuple[list[tuple[Path, str]], int]:
    """Files named by `paths`, folders searched below, as ((path, id), …), and how many others a
    folder held that are neither images nor manifests.

    The id of a file is its path below the given folder, or its name when it was given itself.
    Raises NotFoundError for a path that does not exist.
    """
    found: list[tuple[Path, str]] = []
    others = 0
    for given in paths:
        if not given.exists():
            raise NotFoundError(f"{given} does not exist.", reason="FILE_NOT_FOUND")
        if not given.is_dir():
            found.append((given, given.name))
            continue
        for folder, subfolders, names in os.walk(given):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix.lower() in IMAGE_SUFFIXES | MANIFEST_SUFFIXES:
                    found.append((path, path.relative_to(given).as_posix()))
                else:
                    others += 1
    return found, others


def read(
    files: Iterable[tuple[Path, str]], rules: MetadataRules, *, prefix: str = ""
) -> Iterator[Item | BadSource]:
    """Documents of files and manifests, in order; what cannot be read is told, not raised."""
    for path, name in files:
        if path.suffix.lower() in MANIFEST_SUFFIXES:
            yield from _read_manifest(path, rules, prefix)
            continue
        try:
            document = Document(
                id=prefix + name,
                content=Content.of("", read_file(path)),
                metadata=rules.of(name),
            )
        except (NotFoundError, InvalidInputError) as error:
            yield BadSource(str(path), error.message)
        else:
            yield Item(str(path), document)


def without_duplicates(items: Iterable[Item | BadSource]) -> Iterator[Item | BadSource | None]:
    """Passes on what is new; None stands for a copy of an earlier document (same content and
    metadata), a `BadSource` for another document under an id that was used already."""
    contents: set[tuple[str, str]] = set()
    ids: dict[str, str] = {}
    for item in items:
        if isinstance(item, BadSource):
            yield item
            continue
        document = item.document
        labels = json.dumps(dict(document.metadata), sort_keys=True)
        key = (document.content.content_hash, labels)
        if key in contents:
            yield None
        elif document.id in ids:
            yield BadSource(
                item.source,
                f"the id {document.id!r} is already taken by {ids[document.id]} with other "
                "content; rename one of them, or ingest them with different --id-prefix",
            )
        else:
            contents.add(key)
            ids[document.id] = item.source
            yield item


def read_metadata_file(path: Path) -> dict[str, Metadata]:
    """A JSON file {"path or file name": {"field": value, …}, …}.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    table = _parse_json(read_file(path), str(path))
    if not isinstance(table, dict):
        raise InvalidInputError(
            f'{path} must hold an object {{"file name": {{"field": value}}}}.',
            reason="INVALID_METADATA",
        )
    return {name: _metadata(fields, f"{path}: {name!r}") for name, fields in table.items()}


def _read_manifest(path: Path, rules: MetadataRules, prefix: str) -> Iterator[Item | BadSource]:
    try:
        lines = read_file(path).splitlines()
    except (NotFoundError, InvalidInputError) as error:
        yield BadSource(str(path), error.message)
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            document = _manifest_document(line, path, rules, prefix)
        except (NotFoundError, InvalidInputError) as error:
            yield BadSource(source, error.message)
        else:
            yield Item(source, document)


def _manifest_document(line: bytes, manifest: Path, rules: MetadataRules, prefix: str) -> Document:
    row = _parse_json(line, "the line")
    if not isinstance(row, dict):
        raise InvalidInputError("the line is not a JSON object.", reason="INVALID_MANIFEST")
    if unknown := set(row) - {"id", "text", "image", "images", "metadata"}:
        raise InvalidInputError(
            f"unknown fields {', '.join(sorted(unknown))}; expected id, text, image or images, "
            "and metadata.",
            reason="INVALID_MANIFEST",
        )
    if "image" in row and "images" in row:
        raise InvalidInputError("give either image or images, not both.", reason="INVALID_MANIFEST")
    names = row.get("images", [row["image"]] if "image" in row else [])
    text = row.get("text", "")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InvalidInputError(
            "image must be a file name, images a list of them.", reason="INVALID_MANIFEST"
        )
    if not isinstance(text, str):
        raise InvalidInputError("text must be a string.", reason="INVALID_MANIFEST")
    content = Content.of(text, *(read_file(manifest.parent / name) for name in names))
    if content.empty:
        raise InvalidInputError("neither text nor image is given.", reason="INVALID_MANIFEST")
    id = row.get("id", names[0] if names else None)
    if not isinstance(id, str) or not id:
        raise InvalidInputError(
            "id is missing; a document without an image needs one.", reason="INVALID_MANIFEST"
        )
    own = _metadata(row.get("metadata", {}), "metadata")
    return Document(id=prefix + id, content=content, metadata={**rules.of(id), **own})


def _metadata(fields: Any, where: str) -> dict[str, MetadataValue]:
    if not isinstance(fields, dict) or not all(
        isinstance(value, str | int | float | bool) for value in fields.values()
    ):
        raise InvalidInputError(
            f"{where} must be an object whose values are texts, numbers, true or false.",
            reason="INVALID_METADATA",
        )
    return fields


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{where} is not JSON: {error}.", reason="INVALID_JSON") from None
