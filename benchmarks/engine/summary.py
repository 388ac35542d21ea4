"""The table of a result: what, goal, and the figure of each size of model with its verdict."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table


def summary(result: dict[str, Any]) -> str:
    """The table: what, figure, goal, ok or miss, for each size."""
    sizes = result["sizes"]
    lines: dict[str, list[str]] = {}
    for size, figures in sizes.items():
        for part in figures.values():
            for one in part.get("rows", ()):
                line = lines.setdefault(one["what"], [one["what"], one["goal"]])
                line += ["–"] * (2 + list(sizes).index(size) - len(line))
                line.append(f"{one['figure']:g} {one['verdict']}")
    width = 2 + len(sizes)
    rows = [line + ["–"] * (width - len(line)) for line in lines.values()]
    names = {"random": "random, 110 M", "builtin": "built-in"}
    return table(["what", "goal", *(names[size] for size in sizes)], rows)
