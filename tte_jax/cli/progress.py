"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tte_jax.cli.output import Output

_LINE_EVERY_S = 10.0


@contextlib.contextmanager
def bar(title: str, total: int | None, out: Output) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many are done; writes to stderr.

    Logs of a build or a pipe get a plain line every ten seconds in place of a bar.
    """
    if out.err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=out.err) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    started = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            rate = done / (now - started)
            out.note(f"{title}: {done}{f' of {total}' if total else ''} ({rate:.1f}/s)")

    yield line
