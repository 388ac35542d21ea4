"""One call of one stage: bounded in time, timed, and failing only with `tte_jax.errors` types."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from tte_jax.errors import DeadlineExceededError, InternalError, TteError

T = TypeVar("T")
log = logging.getLogger(__name__)


def now() -> float:
    """Seconds on the event loop's clock, the only clock of the cascade."""
    return asyncio.get_running_loop().time()


async def bounded(stage: str, call: Awaitable[T], timeout_s: float | None) -> T:
    """Awaits `call` for at most `timeout_s` seconds, then cancels it.

    Stages honour their own timeout; this holds for one that hangs.

    Raises:
      DeadlineExceededError: no answer in time.
      InternalError: the stage raised something that is not a `TteError`; the cause is logged and
        not shown.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TteError:
        raise
    except TimeoutError:
        raise DeadlineExceededError(
            f"the {stage} stage gave no answer within {timeout_s or 0.0:.3g} s; "
            "allow more time or spend a smaller budget",
            stage=stage,
        ) from None
    except Exception as error:
        log.exception("the %s stage failed unexpectedly", stage)
        raise InternalError(f"the {stage} stage failed unexpectedly", stage=stage) from error
