"""Exit codes of `tte`, and what a person reads when something goes wrong.

| code | meaning |
|---|---|
| 0 | done |
| 1 | something else failed; some documents of an ingest failed; a stage of the demo did not run |
| 2 | wrong usage or invalid input: nothing was done, trying again cannot help |
| 3 | a file, document or model does not exist |
| 4 | no service answers, or it is overloaded or not ready: try again |
| 5 | the deadline passed |
| 130 | interrupted with Ctrl-C |
"""

from __future__ import annotations

from tte_jax.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    TteError,
    UnavailableError,
)

OK, FAILED, INVALID, NOT_FOUND, UNAVAILABLE, DEADLINE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_CODES: tuple[tuple[type[TteError], int], ...] = (
    (InvalidInputError, INVALID),
    (NotFoundError, NOT_FOUND),
    (UnavailableError, UNAVAILABLE),
    (OverloadedError, UNAVAILABLE),
    (DeadlineExceededError, DEADLINE),
)


def exit_code(error: BaseException) -> int:
    """The exit code that stands for `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def hint(error: BaseException) -> str:
    """What to do about `error`, or "" when its message already says it all."""
    if isinstance(error, UnavailableError):
        return (
            "Is the system running? Start it with `make serve` (or `tte serve`); "
            "for another machine give --address host:port."
        )
    if isinstance(error, OverloadedError):
        return f"Try again in {error.retry_after_s:.0f} s."
    if isinstance(error, DeadlineExceededError):
        return "Allow more time with --timeout, or spend less with --budget."
    return ""
