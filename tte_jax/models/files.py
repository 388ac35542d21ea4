"""Configuration files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tte_jax.errors import PreconditionError


def read_json(path: Path, *, reason: str = "BAD_MODEL_FILE") -> dict[str, Any]:
    """The object in a JSON file that is there.

    Raises:
      PreconditionError: it is not JSON (as after a download that broke off), or no object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PreconditionError(
            f"{str(path)!r} is not valid JSON: {error}. Download the model again.",
            reason=reason,
            path=path,
        ) from error
    if not isinstance(found, dict):
        raise PreconditionError(
            f"{str(path)!r} holds a JSON {type(found).__name__} where an object is expected. "
            "Download the model again.",
            reason=reason,
            path=path,
        )
    return found
