"""Command lines of `training`: how they end, and the trainers' presets.

A trainer has presets by name, and every field of one as an option:

    python -m training.contrastive --config paper-2b --model models/Qwen2-VL-2B --steps 100
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

from training import launch
from tte_jax.cli import exits
from tte_jax.errors import InvalidInputError, TteError, UnavailableError

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
    """`ended` for a trainer.

    Args:
      about: the module's docstring; its first line describes the command.
    """
    launch.without_avx512(os.environ)
    return ended(lambda: main(parse(presets, (about or "").split("\n")[0], arguments)))


def ended(work: Callable[[], object]) -> int:
    """Does a command's work; returns the exit code of `tte_jax.cli.exits`.

    An error is told in a line or two. SIGTERM unwinds the work, so that what it runs as processes
    of its own is ended too; then SystemExit is raised with 128 + its number.
    """
    try:
        with _unwound_by_sigterm():
            work()
    except (TteError, KeyboardInterrupt) as error:
        print(f"Error: {getattr(error, 'message', 'interrupted')}", file=sys.stderr)
        if isinstance(error, UnavailableError):
            print("Run the same command again once that is mended.", file=sys.stderr)
        return exits.exit_code(error)
    return exits.OK


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
