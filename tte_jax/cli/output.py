"""Where `tte` writes: results to stdout, everything else to stderr; with --json one document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from tte_jax.cli import exits
from tte_jax.errors import TteError


class Output:
    """What the commands write to.

    Attributes:
      json: one JSON document goes to stdout instead of tables.
      out: stdout, for results; silent in JSON mode.
      err: stderr, for progress, notes and errors.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        # With no terminal there is no width to respect, and truncated ids are worth nothing.
        width = None if sys.stdout.isatty() else 120
        self.out = Console(quiet=json, width=width, highlight=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """A table or text for people; nothing in JSON mode."""
        self.out.print(renderable)

    def note(self, message: str) -> None:
        """A remark for people, on stderr."""
        self.err.print(f"[dim]{escape(message)}[/]")

    def document(self, make: Callable[[], Any]) -> None:
        """The one JSON document of this run, in JSON mode only."""
        if self.json:
            sys.stdout.write(json.dumps(make(), ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()

    def error(self, error: BaseException) -> int:
        """Says what went wrong; returns the exit code."""
        code = exits.exit_code(error)
        if isinstance(error, TteError):
            message, reason = error.message, error.reason
        elif isinstance(error, KeyboardInterrupt):
            message, reason = "Interrupted.", "INTERRUPTED"
        else:
            message = (
                f"Something unexpected happened: {type(error).__name__}: {error}. "
                "Run again with TTE_DEBUG=1 to see where, and please report it."
            )
            reason = "INTERNAL"
        self.err.print(f"[bold red]Error:[/] {escape(message)}")
        if advice := exits.hint(error):
            self.err.print(escape(advice))
        self.document(
            lambda: {
                "error": {"reason": reason, "message": message, "exit_code": code, "hint": advice}
            }
        )
        return code
