"""SIGTERM and SIGINT end a run after the step under way, all processes at the same one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

import jax
import numpy as np

from training.batches import agreed


class StopRequest:
    """A context in which the signals are remembered instead of ending the process.

    A second one is not remembered: it ends the process as usual.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def asked(self) -> bool:
        """Whether any process of the job was told to stop; every process must call it."""
        if jax.process_count() == 1:
            return bool(self.signal)
        return bool(agreed(np.array([self.signal], np.int64))[0])

    def leave(self) -> NoReturn:
        """Ends the process as the signal would have, with the code 128 + its number: what was asked
        for is not complete, and whoever started this must not take it for that."""
        raise SystemExit(128 + self.signal)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}
