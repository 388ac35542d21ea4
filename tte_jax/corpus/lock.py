"""One writer per corpus: an advisory lock that dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from tte_jax.corpus.faults import translated
from tte_jax.errors import PreconditionError


class WriterLock:
    """Exclusive `flock` on a file; the kernel releases it when the holder dies, even by SIGKILL.

    Raises:
      PreconditionError: another process (or another object in this one) holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with translated(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.pread(self._handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._handle)
            raise PreconditionError(
                f"the corpus in {path.parent} is already open for writing by process {holder}. "
                "Stop that server, or give this one another corpus directory.",
                reason="CORPUS_IN_USE",
                path=path.parent,
                holder=holder,
            ) from exc
        # The pid only makes the message above useful, so a full disk must not stop the opening.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
