"""Snapshots of the index's rows: a fast start, never the truth.

`snapshots/<sequence>/` holds `vectors.npy`, `sequences.npy`, `ids.json` and `manifest.json` with
the sha256 of each; the database holds the sha256 of the manifest (the snapshot's digest). It is
written beside, synced and renamed, so it exists whole or not at all; one that was torn, damaged or
put there by somebody else is skipped with a warning. No pickle is written or read. Metadata and
everything after the sequence come from the database.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.corpus.durable import fsync_directory
from tte_jax.corpus.faults import translated
from tte_jax.errors import DataLossError
from tte_jax.index.generation import Rows

log = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST = "manifest.json"
_KEPT = 2


def write(
    root: Path, rows: Rows, *, corpus_id: str, sequence: int, known: Mapping[int, str]
) -> Path:
    """Write the snapshot of `sequence` and drop all but the newest two.

    Args:
      known: sequence → digest of earlier snapshots; one that is known and whole is kept as it is.

    Raises:
      StorageFullError: no disk space; older snapshots are left as they were.
      PreconditionError: the directory is read-only.
    """
    target = root / f"{sequence:020d}"
    temporary = root / f".{uuid.uuid4().hex}.tmp"
    with translated(target):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        if _problem(target, corpus_id, known) is None:
            return target
        try:
            temporary.mkdir()
            files = {
                "vectors.npy": _npy(rows.vectors.astype("<f4", copy=False)),
                "sequences.npy": _npy(rows.sequences.astype("<i8", copy=False)),
                "ids.json": json.dumps(list(rows.ids)).encode(),
            }
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "corpus_id": corpus_id,
                "sequence": sequence,
                "rows": len(rows),
                "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            }
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _write_synced(temporary / _MANIFEST, json.dumps(manifest, indent=1).encode())
            fsync_directory(temporary)
            if target.exists():
                shutil.rmtree(target)
            os.rename(temporary, target)
            fsync_directory(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in listed(root)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def listed(root: Path) -> list[Path]:
    """Snapshot directories, newest first; nothing is said about their content."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def size(path: Path) -> int:
    """Bytes of one snapshot; 0 when a newer one has just replaced it."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0


def digest(path: Path) -> str:
    """sha256 of a snapshot's manifest, which has the sha256 of everything else."""
    return hashlib.sha256((path / _MANIFEST).read_bytes()).hexdigest()


def load_newest(
    root: Path, *, corpus_id: str, horizon: int, sequence: int, known: Mapping[int, str]
) -> tuple[int, Rows] | None:
    """The newest valid snapshot as (sequence, rows without metadata), or `None`.

    Args:
      root: the snapshots' directory.
      corpus_id: snapshots of another corpus are skipped.
      horizon: older ones cannot be brought up to date and are skipped.
      sequence: the corpus's last write; a later snapshot does not belong to this database.
      known: sequence → digest, as the database has them; any other snapshot is skipped.
    """
    for path in listed(root):
        try:
            manifest = _manifest(path, corpus_id, known)
            if not horizon <= manifest["sequence"] <= sequence:
                raise DataLossError(
                    f"it has sequence {manifest['sequence']}, the database can complete "
                    f"snapshots of {horizon} to {sequence}"
                )
            return manifest["sequence"], _load(path, manifest)
        except (OSError, ValueError, KeyError, TypeError, DataLossError) as exc:
            log.warning("skipping snapshot %s: %s", path, exc)
    return None


def _load(path: Path, manifest: dict[str, Any]) -> Rows:
    data = {name: (path / name).read_bytes() for name in manifest["sha256"]}
    for name, expected in manifest["sha256"].items():
        actual = hashlib.sha256(data[name]).hexdigest()
        if actual != expected:
            raise DataLossError(f"{name} has sha256 {actual}, the manifest says {expected}")
    vectors = np.load(io.BytesIO(data["vectors.npy"]), allow_pickle=False)
    sequences = np.load(io.BytesIO(data["sequences.npy"]), allow_pickle=False)
    ids = json.loads(data["ids.json"])
    if not len(ids) == len(vectors) == len(sequences) == manifest["rows"] or vectors.ndim != 2:
        raise DataLossError("its files disagree about the number of rows")
    return Rows(
        ids, vectors.astype(np.float32, copy=False), sequences.astype(np.int64, copy=False), []
    )


def _manifest(path: Path, corpus_id: str, known: Mapping[int, str]) -> dict[str, Any]:
    raw = (path / _MANIFEST).read_bytes()
    manifest = json.loads(raw)
    if manifest["format"] != FORMAT:
        raise DataLossError(f"it has format {manifest['format']}, expected {FORMAT}")
    if manifest["corpus_id"] != corpus_id:
        raise DataLossError(f"it belongs to corpus {manifest['corpus_id']}, not {corpus_id}")
    if manifest["sequence"] != int(path.name):
        raise DataLossError(f"its manifest says sequence {manifest['sequence']}")
    if known.get(manifest["sequence"]) != hashlib.sha256(raw).hexdigest():
        raise DataLossError("its manifest is not the one that this corpus wrote")
    return manifest


def _problem(path: Path, corpus_id: str, known: Mapping[int, str]) -> str | None:
    try:
        _load(path, _manifest(path, corpus_id, known))
    except (OSError, ValueError, KeyError, TypeError, DataLossError) as exc:
        return str(exc)
    return None


def _sweep(root: Path) -> None:
    # Left by a process that died while writing; the corpus lock says that it is not running.
    for path in root.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
