"""Media files under the hash of their content, on a local disk or an object store.

`ab/cd/abcd…` (sha256): equal files are stored once, a name never changes its content, and every
read is checked. A file is durable before the database row that names it is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from tte_jax.corpus.durable import fsync_directory, fsync_file, write_atomically
from tte_jax.corpus.faults import translated
from tte_jax.errors import DataLossError

_KEY = re.compile(r"[0-9a-f]{64}")


class MediaStore(Protocol):
    """Content-addressed bytes. Keys are 64 lower-case hexadecimal characters."""

    uri: str

    def put(self, data: bytes) -> str:
        """Store durably, once; returns the sha256. Heals a damaged copy of the same content."""
        ...

    def get(self, sha256: str) -> bytes:
        """The bytes; raises `DataLossError` when they are missing or fail their hash."""
        ...

    def remove(self, sha256: str) -> None:
        """Forget a file; unknown keys are ignored."""
        ...

    def keys(self) -> Iterator[str]:
        """The keys of all files that are there, whatever their content is."""
        ...

    def sweep(self) -> int:
        """Remove what a process that died left half-written; returns how many files.

        Only for the one writer, while it puts nothing.
        """
        ...


def open_media(uri: str | Path) -> MediaStore:
    """A media store for a local path or `file://` URI, else for any fsspec URI (`s3://…`)."""
    text = str(uri)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalMedia(Path(text))
    return ObjectMedia(text)


class LocalMedia:
    """Files on a local disk: write beside, fsync, rename, fsync the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self._durable_directories: set[Path] = set()

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._path(sha256)
        with translated(path):
            if path.is_file() and path.read_bytes() == data:
                # Perhaps left by a process that died before its directory sync.
                fsync_file(path)
                fsync_directory(path.parent)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
            self._sync_fan_out(path.parent)
        return sha256

    def get(self, sha256: str) -> bytes:
        path = self._path(sha256)
        try:
            with translated(path):
                data = path.read_bytes()
        except FileNotFoundError as exc:
            raise _missing(sha256, self.uri) from exc
        return _checked(data, sha256, self.uri)

    def remove(self, sha256: str) -> None:
        path = self._path(sha256)
        with translated(path):
            path.unlink(missing_ok=True)

    def keys(self) -> Iterator[str]:
        for file in self.root.glob("??/??/*"):
            if _KEY.fullmatch(file.name):
                yield file.name

    def sweep(self) -> int:
        count = 0
        with translated(self.root):
            for file in self.root.glob("??/??/.*.tmp"):
                file.unlink(missing_ok=True)
                count += 1
        return count

    def _path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def _sync_fan_out(self, leaf: Path) -> None:
        # The fan-out directories may be new themselves; once per process is enough.
        if leaf not in self._durable_directories:
            fsync_directory(leaf.parent)
            fsync_directory(self.root)
            self._durable_directories.add(leaf)


class ObjectMedia:
    """Any fsspec file system. Object stores make a put atomic and durable by themselves."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        # fsspec types its file systems as `Any`-like; the methods used are pipe, cat and rm.
        fs, root = fsspec.core.url_to_fs(uri)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        key = self._key(sha256)
        with translated(key):
            self._fs.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(key, data)
        return sha256

    def get(self, sha256: str) -> bytes:
        key = self._key(sha256)
        try:
            with translated(key):
                data = self._fs.cat_file(key)
        except FileNotFoundError as exc:
            raise _missing(sha256, self.uri) from exc
        return _checked(bytes(data), sha256, self.uri)

    def remove(self, sha256: str) -> None:
        key = self._key(sha256)
        with translated(key):
            if self._fs.exists(key):
                self._fs.rm_file(key)

    def keys(self) -> Iterator[str]:
        with translated(self.uri):
            found = self._fs.find(self._root) if self._fs.exists(self._root) else []
        for name in found:
            key = str(name).rpartition("/")[2]
            if _KEY.fullmatch(key):
                yield key

    def sweep(self) -> int:
        return 0  # an object is there whole or not at all

    def _key(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _missing(sha256: str, where: str) -> DataLossError:
    return DataLossError(
        f"media {sha256} is missing from {where}. Restore it or ingest its documents again.",
        reason="MEDIA_MISSING",
        sha256=sha256,
    )


def _checked(data: bytes, sha256: str, where: str) -> bytes:
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise DataLossError(
            f"media {sha256} in {where} has content of hash {actual}: the file was damaged. "
            "Ingest its documents again to heal it.",
            reason="MEDIA_DAMAGED",
            sha256=sha256,
        )
    return data
