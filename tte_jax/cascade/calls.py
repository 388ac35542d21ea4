"""One call of one stage: bounded in time, timed, and failing only with `tte_jax.errors` types."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from tte_jax.errors import DeadlineExceededError, InternalError, InvalidInputError, TteError

T = TypeVar("T")
log = logging.getLogger(__name__)

# Stages number their inputs (`inputs[3].content.parts[0].image.data`); the caller gave one content.
_ITEM = re.compile(r"(?:inputs|entries)\[\d+\]\.(?:document\.)?(\w+)")


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


def relocated(error: InvalidInputError, places: Mapping[str, str]) -> InvalidInputError:
    """A stage's complaint about one of its inputs, as one about the caller's request.

    Args:
      places: where the fields of an input come from in the request, e.g. `content` → `query`.
        A path that is not in it stays.
    """
    found = _ITEM.match(error.field)
    if found is None or found[1] not in places:
        return error
    field = places[found[1]] + error.field[found.end() :]
    message = error.message.replace(error.field, field)
    moved = InvalidInputError(message, field=field, reason=error.reason)
    moved.metadata = error.metadata
    return moved
