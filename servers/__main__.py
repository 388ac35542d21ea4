"""`python -m servers SERVICE [--flags]`: one service, or `all` of them under a supervisor."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from servers import runtime
from servers.settings import Settings, parse
from tte_jax.errors import InvalidInputError


async def create(settings: Settings) -> runtime.Service:
    # Imported only now, when the port is bound: a taken port should not wait for JAX to load.
    module = importlib.import_module(f"servers.{settings.service}")
    return await module.create(settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code (see `servers.runtime`)."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
    except InvalidInputError as error:
        print(error.message, file=sys.stderr)
        return runtime.EXIT_CONFIGURATION
    runtime.die_with_parent(settings.parent_pid)
    if settings.service == "all":
        from servers import supervisor

        return supervisor.run(settings)
    return runtime.run(settings, create)


if __name__ == "__main__":
    sys.exit(main())
