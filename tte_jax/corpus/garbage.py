"""Media files that no document names: left by a process that died between the file and its row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice

from tte_jax.corpus.media import MediaStore
from tte_jax.corpus.store import CorpusStore

log = logging.getLogger(__name__)

_PER_TURN = 1000


def collect(
    store: CorpusStore,
    media: MediaStore,
    writes_stopped: Callable[[], AbstractContextManager[object]],
    *,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Remove every media file that no document names; returns how many.

    Writers put files before rows, so a file may be looked at only while no write is under way:
    `writes_stopped()` is entered for a thousand files at a time, and `go_on()` is asked between.

    Raises:
      PreconditionError: the media cannot be removed (a read-only disk).
    """
    with writes_stopped():
        removed = media.sweep()
    keys = media.keys()
    while go_on() and (some := list(islice(keys, _PER_TURN))):
        with writes_stopped():
            for sha256 in store.unreferenced(some):
                media.remove(sha256)
                removed += 1
    if removed:
        log.info("%d media files that no document names were removed from %s", removed, media.uri)
    return removed
