"""Operating-system and SQLite failures, turned into errors a caller can act on.

The one place that decides what a full disk, a read-only directory or a damaged file is called.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator

from tte_jax.errors import DataLossError, PreconditionError, StorageFullError, TteError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_NOT_WRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


def storage_full(where: object) -> StorageFullError:
    return StorageFullError(
        f"no space left to write {where}; nothing of this request was stored. "
        "Free disk space, then send it again.",
        path=where,
    )


def not_writable(where: object) -> PreconditionError:
    return PreconditionError(
        f"{where} cannot be written: the file system or the directory is read-only for this "
        "user. Mount it writable or choose another corpus directory.",
        reason="READ_ONLY",
        path=where,
    )


@contextlib.contextmanager
def translated(where: object) -> Iterator[None]:
    """Raise `tte_jax.errors` types instead of `OSError` and `sqlite3.Error`.

    Args:
      where: the file or directory at work, for the message.

    Raises:
      StorageFullError: no disk space or quota is left.
      PreconditionError: the place is read-only, or the database is locked by another program.
      DataLossError: the file is damaged.
    """
    try:
        yield
    except TteError:
        raise
    except sqlite3.Error as exc:
        # Extended codes carry the primary code in the low byte.
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise storage_full(where) from exc
        if code in _NOT_WRITABLE:
            raise not_writable(where) from exc
        if code in _DAMAGED:
            raise DataLossError(
                f"{where} is damaged or is not a corpus database ({exc}). Restore it from a "
                "backup or ingest again into an empty directory.",
                path=where,
            ) from exc
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise PreconditionError(
                f"{where} is locked by another program. Stop it, then try again.",
                reason="CORPUS_LOCKED",
                path=where,
            ) from exc
        raise
    except OSError as exc:
        if exc.errno in _FULL:
            raise storage_full(where) from exc
        if exc.errno in _READ_ONLY:
            raise not_writable(where) from exc
        raise
