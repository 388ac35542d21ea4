"""What `tte ingest` reads from disk: folders of images, videos and PDFs, and JSONL manifests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tte_jax import limits
from tte_jax.cli import files, manifests
from tte_jax.codec.search import encode_ingest_document
from tte_jax.content import Content, Document, Metadata, MetadataValue, Text
from tte_jax.errors import InvalidInputError, NotFoundError

SUFFIXES = files.SUFFIXES | manifests.MANIFEST_SUFFIXES


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


def find(
    paths: Sequence[Path], unreadable: list[BadSource] | None = None
) -> tuple[list[tuple[Path, str]], int]:
    """Files named by `paths`, folders searched below, as ((path, id), …), and how many others a
    folder held that cannot become documents.

    The id of a file is its path below the given folder, or its name when it was given itself.
    Folders that cannot be read are added to `unreadable`.
    Raises NotFoundError for a path that does not exist.
    """

    def note(error: OSError) -> None:
        if unreadable is not None:
            why = f"the folder cannot be read: {error.strerror or error}."
            unreadable.append(BadSource(str(error.filename), why))

    found: list[tuple[Path, str]] = []
    others = 0
    for given in paths:
        if not given.exists():
            raise NotFoundError(f"{given} does not exist.", reason="FILE_NOT_FOUND")
        if not given.is_dir():
            found.append((given, given.name))
            continue
        for folder, subfolders, names in os.walk(given, onerror=note):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES:
                    found.append((path, path.relative_to(given).as_posix()))
                else:
                    others += 1
    return found, others


def read(
    found: Iterable[tuple[Path, str]], rules: MetadataRules, *, prefix: str = ""
) -> Iterator[Item | BadSource]:
    """Documents of files and manifests, in order; what cannot be read is told, not raised.

    A PDF becomes a document a page, with the page's number in its id and its metadata.
    """
    for path, name in found:
        suffix = path.suffix.lower()
        try:
            if suffix in manifests.MANIFEST_SUFFIXES:
                yield from _of_manifest(path, rules, prefix)
            elif suffix in files.PDF_SUFFIXES:
                pdf = files.Pdf(path)
                yield from _of_pdf(pdf, str(path), prefix + name, rules.of(name))
            elif suffix in files.VIDEO_SUFFIXES:
                content = Content((files.read_video(path),))
                yield Item(str(path), Document(prefix + name, content, rules.of(name)))
            else:
                content = Content.of("", files.read_file(path))
                yield Item(str(path), Document(prefix + name, content, rules.of(name)))
        except (NotFoundError, InvalidInputError) as error:
            yield BadSource(_printable(str(path)), _printable(error.message))


def _of_manifest(path: Path, rules: MetadataRules, prefix: str) -> Iterator[Item | BadSource]:
    for line in manifests.lines(path):
        source = f"{path}:{line.number}"
        if isinstance(line, manifests.BadLine):
            yield BadSource(source, line.error.message)
            continue
        metadata = {**rules.of(line.id), **line.metadata}
        if line.pdf is not None:
            yield from _of_pdf(line.pdf, source, prefix + line.id, metadata, line.content.text)
        else:
            yield Item(source, Document(prefix + line.id, line.content, metadata))


def _of_pdf(
    pdf: files.Pdf, source: str, id: str, metadata: Metadata, text: str = ""
) -> Iterator[Item | BadSource]:
    for number in pdf.numbers():
        where = f"{source}, page {number}"
        try:
            page = pdf.page(number)
        except InvalidInputError as error:
            yield BadSource(where, error.message)
            continue
        content = Content((page, Text(text)) if text else (page,))
        labels = {"page": number, "pages": pdf.pages, **metadata}
        yield Item(where, Document(manifests.page_id(id, number), content, labels))


def without_duplicates(items: Iterable[Item | BadSource]) -> Iterator[Item | BadSource | None]:
    """Passes on what is new; None stands for a copy of an earlier document (same content and
    metadata), a `BadSource` for another document under an id that was used already, and for one
    that no message can carry."""
    contents: set[bytes] = set()
    ids: dict[str, str] = {}
    for item in items:
        if isinstance(item, BadSource):
            yield item
            continue
        document = item.document
        if bad := _unsendable(item):
            yield bad
            continue
        labels = json.dumps(dict(document.metadata), sort_keys=True)
        key = hashlib.sha256(f"{document.content.content_hash}{labels}".encode()).digest()[:16]
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


def _unsendable(item: Item) -> BadSource | None:
    """Why a document would end the whole stream: its texts are no Unicode (a file's name in another
    encoding, half of an emoji), its metadata no values, or it is too large."""
    try:
        size = encode_ingest_document(item.document).ByteSize()
    except UnicodeEncodeError as error:
        return BadSource(
            _printable(item.source),
            f"{error.object[:80]!a} is no Unicode text: rename the file, or correct the line",
        )
    except (InvalidInputError, ValueError) as error:
        return BadSource(_printable(item.source), getattr(error, "message", str(error)))
    if size > limits.MAX_MESSAGE_BYTES:
        return BadSource(
            item.source,
            f"the document has {size:,} bytes; at most {limits.MAX_MESSAGE_BYTES:,} can be sent",
        )
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def read_metadata_file(path: Path) -> dict[str, Metadata]:
    """A JSON file {"path or file name": {"field": value, …}, …}.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    table = manifests.parse_json(files.read_file(path), str(path))
    if not isinstance(table, dict):
        raise InvalidInputError(
            f'{path} must hold an object {{"file name": {{"field": value}}}}.',
            reason="INVALID_METADATA",
        )
    return {name: manifests.metadata(fields, f"{path}: {name!r}") for name, fields in table.items()}
