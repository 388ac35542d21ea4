"""Rounds of mined negatives on disk: written once, sealed, never changed.

    rounds/
      round-00000/            sealed: `manifest.json` names every part with its hash
        part-00000-1f3a….jsonl
        manifest.json
      round-00001.open/       being written; nobody reads it
        header.json           what it is made of; another run cannot go on with it
        part-00000-77c0….jsonl

A part is written beside, synced, and renamed to a name that holds its hash. A killed writer leaves
whole parts behind, counts what they hold, and goes on from there. Sealing writes the manifest and
renames the folder. Nothing in a round tells when or where it was made, so that the same inputs give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.mining.records import Record, Rules
from tte_jax.corpus.durable import fsync_directory, write_atomically
from tte_jax.corpus.faults import translated
from tte_jax.corpus.lock import WriterLock
from tte_jax.errors import DataLossError, PreconditionError

FORMAT = 1
PART_RECORDS = 1024
MANIFEST, HEADER, OPEN = "manifest.json", "header.json", ".open"
_PART = re.compile(r"part-(\d{5})-([0-9a-f]{16})\.jsonl")
_ROUND = re.compile(r"round-(\d{5})")


class RoundWriter:
    """Writes one round, or goes on writing it; the only writer of its folder while it lives.

    Args:
      root: folder of all rounds.
      number: of this one, from 0.
      header: what the round is made of: rules, models, the table's fingerprint. JSON types.
      part_records: records of a part. A restart with another number makes other parts.

    Raises:
      PreconditionError: the round is sealed; another writer is at work (`ROUNDS_IN_USE`); or what
        was begun is of another header (`HEADER_MISMATCH`).
      DataLossError: a part that was begun is damaged.
      StorageFullError: no space is left.
    """

    def __init__(
        self,
        root: Path,
        number: int,
        header: Mapping[str, Any],
        *,
        part_records: int = PART_RECORDS,
    ) -> None:
        self.root, self.number = root, number
        self.sealed_path = root / name_of(number)
        self._open = root / f"{name_of(number)}{OPEN}"
        self._size = part_records
        with translated(root):
            root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = WriterLock(root / ".writer")
        except PreconditionError as error:
            raise PreconditionError(
                f"another process ({error.metadata.get('holder', 'unknown')}) writes rounds in "
                f"{root}. Stop it, or give this one another folder.",
                reason="ROUNDS_IN_USE",
            ) from None
        try:
            self._parts = self._begin(header)
        except BaseException:
            self._lock.release()
            raise
        self._buffer: list[Record] = []

    @property
    def durable(self) -> int:
        """Records that survive whatever happens: a restart begins with the next one."""
        return sum(part["records"] for part in self._parts)

    def append(self, record: Record) -> None:
        """Takes a record; it is durable when its part is full, or at the seal."""
        self._buffer.append(record)
        if len(self._buffer) == self._size:
            self._write_part()

    def seal(self) -> Path:
        """Makes the round readable, and everything in it read-only; returns its folder."""
        if self._buffer:
            self._write_part()
        counts: Counter[str] = Counter()
        for part in self._parts:
            for record in _records(self._open / part["file"], part):
                counts["records"] += 1
                counts["negatives"] += len(record.negatives)
                counts["false_negatives"] += len(record.false_negatives)
                counts["queries_without_negatives"] += not record.negatives
                counts["refused"] += bool(record.refused)
        body = {
            "format": FORMAT,
            "round": self.number,
            **json.loads((self._open / HEADER).read_bytes()),
            "counts": {k: counts[k] for k in _COUNTS},
            "parts": self._parts,
        }
        manifest = {**body, "sha256": _hash(_json(body))}
        with translated(self._open):
            write_atomically(self._open / MANIFEST, _json(manifest))
            (self._open / HEADER).unlink(missing_ok=True)
            for path in self._open.iterdir():
                path.chmod(0o444)
            fsync_directory(self._open)
            os.rename(self._open, self.sealed_path)
            fsync_directory(self.root)
        return self.sealed_path

    def close(self) -> None:
        """Lets another writer in. Records that are in no part yet are dropped."""
        self._lock.release()

    def __enter__(self) -> RoundWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _begin(self, header: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.sealed_path.exists():
            raise PreconditionError(
                f"{self.sealed_path} is sealed; sealed rounds never change", reason="SEALED"
            )
        wanted = _json(header)
        with translated(self._open):
            if (self._open / MANIFEST).exists():
                # Killed between the manifest and the renaming: the manifest says all, and is
                # written anew from the same parts.
                made = json.loads((self._open / MANIFEST).read_bytes())
                begun = _json({k: v for k, v in made.items() if k not in _OWN})
                (self._open / MANIFEST).unlink()
                write_atomically(self._open / HEADER, begun)
            elif not (self._open / HEADER).exists():
                # Nothing was begun for certain: what lies there is a torn beginning.
                shutil.rmtree(self._open, ignore_errors=True)
                self._open.mkdir()
                fsync_directory(self.root)
                write_atomically(self._open / HEADER, wanted)
            begun = (self._open / HEADER).read_bytes()
            if begun != wanted:
                raise PreconditionError(
                    f"{self._open} was begun with {begun.decode()}, and this run has "
                    f"{wanted.decode()}. Go on with the same settings and models, or delete that "
                    "folder.",
                    reason="HEADER_MISMATCH",
                )
            parts = []
            for path in sorted(self._open.iterdir()):
                if found := _PART.fullmatch(path.name):
                    parts.append(_described(path))
                    if int(found[1]) != len(parts) - 1 or parts[-1]["sha256"][:16] != found[2]:
                        raise DataLossError(
                            f"{path} is damaged or out of order. Delete {self._open}; it is mined "
                            "again.",
                            path=path,
                        )
                elif path.name != HEADER:
                    path.unlink()  # a torn part
        return parts

    def _write_part(self) -> None:
        data = b"".join(record.to_line() for record in self._buffer)
        digest = _hash(data)
        name = f"part-{len(self._parts):05d}-{digest[:16]}.jsonl"
        with translated(self._open):
            write_atomically(self._open / name, data)
        self._parts.append(
            {"file": name, "records": len(self._buffer), "bytes": len(data), "sha256": digest}
        )
        self._buffer = []


class Round:
    """A sealed round, read only.

    Args:
      path: its folder.
      verify: read every part and compare its hash.

    Raises:
      DataLossError: it is not sealed, or damaged.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
            body = {k: v for k, v in self.manifest.items() if k != "sha256"}
            whole = _hash(_json(body)) == self.manifest["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise DataLossError(f"{path} is no sealed round ({error})", path=path) from None
        self._parts: list[dict[str, Any]] = self.manifest["parts"]
        for part in self._parts if whole and verify else ():
            whole &= (path / part["file"]).is_file() and _described(path / part["file"]) == part
        if not whole or self.manifest["format"] != FORMAT:
            raise DataLossError(
                f"{path} is damaged: its files are not those of its manifest. Restore it from a "
                "copy, or delete it and mine it again.",
                path=path,
            )
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + part["records"])
        self._read = lru_cache(maxsize=8)(self._read_part)

    @property
    def number(self) -> int:
        return self.manifest["round"]

    @property
    def rules(self) -> Rules:
        """How its negatives were chosen."""
        return Rules(**self.manifest["rules"])

    @property
    def sha256(self) -> str:
        """Names the content of the round, for checkpoints."""
        return self.manifest["sha256"]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, asked for {index}")
        part = bisect_right(self._starts, index) - 1
        return self._read(part)[index - self._starts[part]]

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            yield self[index]

    def _read_part(self, number: int) -> tuple[Record, ...]:
        return tuple(_records(self.path / self._parts[number]["file"], self._parts[number]))


def name_of(number: int) -> str:
    return f"round-{number:05d}"


def sealed(root: Path) -> list[int]:
    """Numbers of the sealed rounds, rising. Open and torn ones are not among them."""
    if not root.is_dir():
        return []
    found = (_ROUND.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(m[1]) for m in found if m and (root / m[0] / MANIFEST).is_file())


_COUNTS = ("records", "negatives", "false_negatives", "queries_without_negatives", "refused")
_OWN = {"format", "round", "counts", "parts", "sha256"}


def _described(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {
        "file": path.name,
        "records": data.count(b"\n"),
        "bytes": len(data),
        "sha256": _hash(data),
    }


def _records(path: Path, part: Mapping[str, Any]) -> Iterator[Record]:
    try:
        data = path.read_bytes()
        if _hash(data) != part["sha256"]:
            raise ValueError("its hash is another")
        for line in data.splitlines():
            yield Record.from_line(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"{path} is damaged ({error}). Mine the round again.") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
