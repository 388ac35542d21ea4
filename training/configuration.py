"""Command lines of the trainers: a preset by name, and every field of it as an option.

python -m training.contrastive --config paper-2b --model models/Qwen2-VL-2B --steps 100
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

from tte_jax.errors import InvalidInputError

C = TypeVar("C")


def parse(presets: Mapping[str, C], description: str, arguments: Sequence[str] | None = None) -> C:
    """The preset that `--config` names (default: the first), changed by the other options.

    Raises:
      InvalidInputError: no such preset.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next(iter(presets))
    for place, one in enumerate(given):
        if one == "--config" or one.startswith("--config="):
            value = one.partition("=")[2] if "=" in one else "".join(given[place + 1 : place + 2])
            del given[place : place + (1 if "=" in one else 2)]
            name = value
            break
    if name not in presets:
        raise InvalidInputError(
            f"no preset {name!r}; --config takes one of {', '.join(presets)}", field="config"
        )
    start = presets[name]
    about = f"{description}\n\n--config NAME: one of {', '.join(presets)}; here {name}."
    return tyro.cli(type(start), default=start, args=given, description=about)
