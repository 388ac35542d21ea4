"""When a call that answers with a stream is tried again; gRPC does it for the others."""

from __future__ import annotations

import random
import time

from tte_jax.errors import TteError, UnavailableError

MAX_ATTEMPTS = 4
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0


class Attempts:
    """The attempts of one call: their pauses, and the time that is left to them together."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._pause = FIRST_PAUSE_S
        self._left = MAX_ATTEMPTS

    @property
    def timeout_s(self) -> float | None:
        """Seconds until the call's deadline, at least 0; `None` = it has none."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def pause_after(self, error: TteError) -> float | None:
        """Seconds to wait before the next attempt, `None` = `error` is the call's outcome.

        Call it only for an attempt that gave no answer yet. As gRPC does, the pauses double and
        are drawn at random, so that many clients do not come back at once.
        """
        self._left -= 1
        pause = self._pause * random.uniform(0.8, 1.2)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        timeout_s = self.timeout_s
        late = timeout_s is not None and pause >= timeout_s
        if not isinstance(error, UnavailableError) or self._left < 1 or late:
            return None
        return pause
