"""Command lines of the trainers: a preset by name, and every field of it as an option.

python -m training.contrastive --config paper-2b --model models/Qwen2-VL-2B --steps 100
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from tte_jax.cli import exits
from tte_jax.errors import InvalidInputError, TteError

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


def command(
    main: Callable[[C], Any],
    presets: Mapping[str, C],
    about: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a trainer as a command; returns the exit code of `tte_jax.cli.exits`.

    Args:
      about: the module's docstring; its first line describes the command.
    """
    try:
        main(parse(presets, (about or "").split("\n")[0], arguments))
    except (TteError, KeyboardInterrupt) as error:
        print(f"Error: {getattr(error, 'message', 'interrupted')}", file=sys.stderr)
        return exits.exit_code(error)
    return exits.OK
