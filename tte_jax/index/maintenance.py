"""Work beside serving, one job at a time on one thread, started when it is due."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tte_jax.errors import TteError

log = logging.getLogger(__name__)

RETRY_S = 60.0


class Job(NamedTuple):
    """`run` is called once in each pass in which it is `due()`; both may come from any thread."""

    name: str
    due: Callable[[], bool]
    run: Callable[[], object]


class Maintenance:
    """Runs jobs in their order whenever `poke` finds one due, in passes until none is.

    A job that is always due again, as a check of searches is under load, holds up no other.
    After a failure, which is logged and kept in `last_error`, nothing is tried for a minute.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = tuple(jobs)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._stopped = False
        self.last_error = ""

    @property
    def stopped(self) -> bool:
        return self._stopped

    def poke(self) -> None:
        """Start the thread if a job is due and it does not run; returns at once."""
        if self._stopped or time.monotonic() < self._retry_at:
            return
        if not any(job.due() for job in self._jobs):
            return
        with self._lock:
            if self._stopped or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(
                target=self._work, name="index-maintenance", daemon=True
            )
            self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the jobs that run now."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Begin nothing more, and wait for the running job, which cannot be interrupted."""
        with self._lock:
            self._stopped = True
        self.join(timeout_s)

    def _work(self) -> None:
        now = ""
        try:
            while any(job.due() for job in self._jobs):
                for job in self._jobs:
                    now = job.name
                    if self._stopped:
                        return
                    if job.due():
                        job.run()
            self.last_error = ""
        except Exception as exc:
            log.exception("index maintenance failed: %s", now)
            self.last_error = exc.message if isinstance(exc, TteError) else type(exc).__name__
            self._retry_at = time.monotonic() + RETRY_S
