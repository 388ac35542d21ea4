"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a blank line above it, so that it renders below an HTML comment.

    Raises ValueError when a row has another number of cells than the head.
    """
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"expected {len(head)} cells, got {len(row)}: {row}")
        lines.append(list(row))
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)
