"""The plots of the HTML report: figures of runs, without a window or a server.

A run has one colour in all of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tte",  # the same ids, and so the same file, on every run
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
_COLOURS = tuple(matplotlib.color_sequences["tab10"]) + tuple(matplotlib.color_sequences["Set2"])
_MARKS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """What a run costs and what it is worth.

    Attributes:
      run: its place among the runs, which gives its colour.
      quality: in percent.
    """

    run: int
    name: str
    cost: float
    quality: float


@dataclass(frozen=True)
class Bars:
    """One run's scores, in percent; NaN = the run lacks the task.

    Attributes:
      low, high: the ends of the intervals; NaN = not known.
    """

    name: str
    scores: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def scatter(points: Sequence[Point], label: str) -> bytes:
    """Quality against a cost: SVG. The legend stands beside it, since names are long."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, max(3.6, 0.22 * len(points) + 1.0)), layout="constrained")
        axes = figure.subplots()
        for point in points:
            mark, colour = _look(point.run)
            axes.plot([point.cost], [point.quality], mark, color=colour, ms=7, label=point.name)
        axes.set_xlabel(label)
        axes.set_ylabel("mean score, %")
        axes.margins(0.12)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        return _svg(figure)


def bars(tasks: Sequence[str], runs: Sequence[Bars]) -> bytes:
    """A group of bars for each task, with intervals where they are known: SVG."""
    with matplotlib.rc_context(_STYLE):
        group = 0.1 * len(runs) + 0.1
        height = group * len(tasks) + 0.16 * len(runs) + 1.0
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(tasks), dtype=float)
        thick = 0.8 / len(runs)
        for i, run in enumerate(runs):
            at = places - 0.4 + (i + 0.5) * thick
            scores = np.asarray(run.scores, float)
            _, colour = _look(i)
            axes.barh(at, scores, thick, color=colour, label=run.name)
            known = np.isfinite(run.low) & np.isfinite(run.high) & np.isfinite(scores)
            if known.any():
                ends = np.array([scores - np.asarray(run.low), np.asarray(run.high) - scores])
                ends = np.maximum(ends[:, known], 0.0)
                axes.errorbar(
                    scores[known], at[known], xerr=ends, fmt="none", ecolor="#333", lw=0.7
                )
        axes.set_yticks(places, tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="x", top=True, labeltop=True)
        axes.set_xlabel("score, %, with 95 % intervals where they are known")
        figure.legend(loc="outside upper left", ncols=1, frameon=False)
        return _svg(figure)


def _look(run: int) -> tuple[str, Any]:
    """The mark and the colour of a run."""
    return _MARKS[run % len(_MARKS)], _COLOURS[run % len(_COLOURS)]


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
