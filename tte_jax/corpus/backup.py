"""A corpus as a folder that can be carried away, made while the corpus is served.

`corpus.sqlite3` (one consistent state), `media/` and `manifest.json`. Snapshots of the index are
not in it: they are made again. Media on an object store stay there and are named in the manifest; a
corpus restored from them reads them and removes none, see `restore`. A backup and a restored corpus
appear under their names whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tte_jax.corpus.durable import fsync_directory, fsync_file, write_atomically
from tte_jax.corpus.faults import translated
from tte_jax.corpus.media import LocalMedia, MediaStore, open_media
from tte_jax.corpus.store import BORROWED_MEDIA, DATABASE, LOCK, MEDIA, CorpusStore
from tte_jax.errors import DataLossError, NotFoundError, PreconditionError

FORMAT = 1
MANIFEST = "manifest.json"
_ATTEMPTS = 10
# What the database remembers of things outside it.
_LIVE = ("media_uri", "snapshots", "milvus", "milvus_recall", "migration")


@dataclass(frozen=True)
class Backup:
    """What a backup holds.

    Attributes:
      corpus_id: of the corpus it was made of.
      sequence: the last write in it.
      documents: live documents.
      media_files: media copied; 0 where they are on an object store.
      media_bytes: their size.
      media_uri: "" = copied, else where they are.
      database_sha256: of `corpus.sqlite3`.
    """

    corpus_id: str
    sequence: int
    documents: int
    media_files: int
    media_bytes: int
    media_uri: str
    database_sha256: str


def media_of(store: CorpusStore) -> MediaStore:
    """The media of a corpus: where it remembers them, else beside its database."""
    return open_media(store.value("media_uri") or store.path / MEDIA)


def backup(corpus: Path, target: Path) -> Backup:
    """Copy a corpus, served or not, to the new folder `target`.

    Raises:
      NotFoundError: there is no corpus.
      PreconditionError: `target` exists and is not empty, or cannot be written.
      DataLossError: a media file is missing or damaged; the message names it.
      StorageFullError: no space; nothing is left at `target`.
    """
    _refuse_existing(target, "TARGET_EXISTS")
    with closing(CorpusStore.open(corpus, read_only=True)) as live, _appearing(target) as folder:
        media = media_of(live)
        copied = LocalMedia(folder / MEDIA) if isinstance(media, LocalMedia) else None
        for _ in range(_ATTEMPTS):
            live.copy_to(folder / DATABASE)
            lost = _copy_media(folder, media, copied) if copied else set()
            if not lost:
                break
            # Of a document deleted meanwhile the media are gone too: take a newer state.
            if named := lost - live.unreferenced(sorted(lost)):
                media.get(min(named))  # raises, unless they have just come back
        else:
            raise PreconditionError(
                "documents are deleted faster than their media can be copied; try again when "
                "fewer deletes run",
                reason="CORPUS_TOO_BUSY",
            )
        made = _describe(folder, "" if copied else media.uri)
        write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **vars(made)}).encode())
    return made


def restore(source: Path, corpus: Path) -> Backup:
    """Make the corpus directory `corpus`, which must not exist yet, from a backup.

    Media on an object store are not copied: they are the first corpus's, which may still be served.
    The new corpus therefore never removes a file there, neither with its document nor as garbage,
    while the first one may, also what the new one put there. To have media of its own, copy the
    objects and open it with their `media_uri`.

    Raises:
      NotFoundError: there is no backup at `source`.
      PreconditionError: there is a corpus already, or a newer program made the backup.
      DataLossError: the backup is damaged; nothing was restored.
      StorageFullError: no space; nothing is left at `corpus`.
    """
    _refuse_existing(corpus, "CORPUS_EXISTS")
    made = check_manifest(source)
    with _appearing(corpus) as folder:
        with translated(folder):
            shutil.copyfile(source / DATABASE, folder / DATABASE)
            fsync_file(folder / DATABASE)
        _check_database(folder / DATABASE, made)
        if not made.media_uri:
            lost = _copy_media(folder, LocalMedia(source / MEDIA), LocalMedia(folder / MEDIA))
            if lost:
                raise DataLossError(
                    f"the backup {source} lacks {len(lost)} media files, the first of them "
                    f"{min(lost)}. Use another backup.",
                    reason="MEDIA_MISSING",
                )
        with closing(CorpusStore.open(folder)) as store:  # migrates, and refuses what is no corpus
            # A corpus of its own: beside the first one it must not write into the same collections.
            store.set_value("corpus_id", uuid.uuid4().hex)
            if made.media_uri:
                store.set_value(BORROWED_MEDIA, made.media_uri)
        (folder / LOCK).unlink()
    return made


def read_manifest(source: Path) -> Backup:
    """What `source` says it holds; raises as `restore`."""
    path = source / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{source} is no backup of a corpus: {MANIFEST} is missing")
    try:
        with translated(path):
            fields: dict[str, Any] = json.loads(path.read_bytes())
        found = fields.pop("format")
        if found == FORMAT:
            return Backup(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise DataLossError(f"{path} is damaged. Use another backup.") from exc
    raise PreconditionError(
        f"{source} is a backup of format {found}; this program knows format {FORMAT}. "
        "Upgrade tte-jax.",
        reason="FORMAT_TOO_NEW",
    )


def check_manifest(source: Path) -> Backup:
    """`read_manifest`, and the database is the one that it speaks of."""
    made = read_manifest(source)
    _check_database(source / DATABASE, made)
    return made


def _check_database(path: Path, made: Backup) -> None:
    try:
        with translated(path):
            actual = _sha256(path)
    except FileNotFoundError as exc:
        raise DataLossError(f"{path} is missing. Use another backup.") from exc
    if actual != made.database_sha256:
        raise DataLossError(
            f"{path} has sha256 {actual}, the backup's manifest says {made.database_sha256}: it "
            "was damaged. Use another backup.",
            reason="BACKUP_DAMAGED",
        )


def _copy_media(folder: Path, source: MediaStore, target: LocalMedia) -> set[str]:
    """Copy what the database in `folder` names, drop all else; returns what is missing."""
    with closing(CorpusStore.open(folder, read_only=True)) as store:
        wanted = store.all_media()
    there = set(target.keys())
    for sha256 in there - wanted:
        target.remove(sha256)
    missing: set[str] = set()
    for sha256 in sorted(wanted - there):
        try:
            target.put(source.get(sha256))
        except DataLossError as exc:
            if exc.reason != "MEDIA_MISSING":
                raise
            missing.add(sha256)
    return missing


def _describe(folder: Path, media_uri: str) -> Backup:
    path = folder / DATABASE
    with translated(path):
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            # Copied media lie beside the database wherever the corpus had them, and an index that
            # goes on being written is not that of this moment.
            db.execute(f"DELETE FROM corpus WHERE key IN ({','.join('?' * len(_LIVE))})", _LIVE)
            if media_uri:
                db.execute("INSERT INTO corpus VALUES ('media_uri', ?)", (media_uri,))
        fsync_file(path)
    with closing(CorpusStore.open(folder, read_only=True)) as store:
        return Backup(
            corpus_id=store.corpus_id,
            sequence=store.sequence,
            documents=store.count(),
            media_files=0 if media_uri else len(store.all_media()),
            media_bytes=0 if media_uri else store.media_bytes(),
            media_uri=media_uri,
            database_sha256=_sha256(path),
        )


def _refuse_existing(path: Path, reason: str) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PreconditionError(
            f"{path} exists already and is not an empty folder. Choose another place, or move it "
            "away first (a server must not be using it).",
            reason=reason,
            path=path,
        )


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends without an error."""
    with translated(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        folder.mkdir()
    try:
        yield folder
        with translated(target):
            fsync_directory(folder)
            os.rename(folder, target)
            fsync_directory(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
