"""The figures of `docs/results.md`, small SVG files drawn from the result files.

Each carries a digest of the figures that it was drawn from, so that a check can tell, whatever
version of the library drew it, whether it shows the committed result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.training_tables import ROUND_ARMS

FOLDER = Path("docs/figures")
# Text stays text, and ids do not change from run to run.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tte",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Result = Mapping[str, Any]


def shown(results: Path) -> Result:
    """All that is drawn: the experiments, and the rounds of mined negatives as one of them."""
    found: dict[str, Any] = {"experiments": {}, "titles": {}}
    if (path := results / "experiments.json").is_file():
        made = json.loads(path.read_text("utf-8"))
        found = {key: dict(made[key]) for key in found}
    if (path := results / "rounds.json").is_file():
        found["experiments"]["rounds"] = {"rows": json.loads(path.read_text("utf-8"))["states"]}
    return found


def write(result: Result, folder: Path) -> list[Path]:
    """Draws the experiments' figures that do not show `result` yet; returns what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in stale(result, folder):
        path = folder / f"{name}.svg"
        with matplotlib.rc_context(_STYLE):
            figure = _DRAW[name](result["experiments"][name], result["titles"])
            about = {"Date": None, "Creator": None, "Description": _digest(result, name)}
            figure.savefig(path, format="svg", metadata=about)
        drawn.append(path)
    return drawn


def stale(result: Result, folder: Path) -> list[str]:
    """Names of the figures that are missing or show another result."""
    return [
        name
        for name in _DRAW
        if name in result["experiments"]
        and not (
            (path := folder / f"{name}.svg").is_file() and _digest(result, name) in path.read_text()
        )
    ]


def _digest(result: Result, name: str) -> str:
    shown = [result["experiments"][name]["rows"], result["titles"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _budget(found: Result, titles: Mapping[str, str]) -> Figure:
    """Quality against the budget: mean of both ways to spend it, and both sides by task."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = found["rows"]
    series = list(dict.fromkeys(label.rpartition(", ")[0] for label in rows))
    budgets = [label.rpartition(", ")[2] for label in rows if label.startswith(series[0])]
    places = range(len(budgets))
    for shift, name in zip((-0.06, 0.06), series, strict=True):
        line = [rows[f"{name}, {budget}"] for budget in budgets]
        _points(left, [p + shift for p in places], line, name)
    for task, title in titles.items():
        line = [rows[f"{series[0]}, {budget}"]["tasks"][task] for budget in budgets]
        right.plot(places, [100 * r["hit@1"] for r in line], "o-", ms=3, lw=1, label=title)
    for axes, title in ((left, "mean over tasks, 95 %"), (right, f"by task, {series[0]}")):
        axes.set_xticks(list(places), budgets)
        axes.set_xlabel("budget, reasoning tokens")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)
    left.set_ylabel("hit@1, %")
    left.set_ylim(bottom=0)
    return figure


def _ablation(found: Result, titles: Mapping[str, str]) -> Figure:
    """A line for each arm: its mean with the interval, and its tasks."""
    rows = found["rows"]
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for task, title in titles.items():
        values = [100 * row["tasks"][task]["hit@1"] for row in rows.values()]
        axes.plot(values, range(len(rows)), "o", ms=4, alpha=0.6, label=title)
    means, spread = _spread(list(rows.values()))
    axes.errorbar(
        means, range(len(rows)), xerr=spread, fmt="kD", ms=5, capsize=3, label="mean, 95 %"
    )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("hit@1, %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _strength(found: Result, titles: Mapping[str, str]) -> Figure:
    """Quality against the share of right reasonings, a point for each reasoner."""
    del titles
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for mark, (label, row) in zip(itertools.cycle("osD^vP*X"), found["rows"].items()):  # noqa: B905
        means, spread = _spread([row])
        x = [100 * row["right"]]
        axes.errorbar(x, means, yerr=spread, fmt=mark, ms=5, capsize=2, lw=1, label=label)
    axes.set_xlabel("ECRs whose answer is right, % (queries and candidates alike)")
    axes.set_ylabel("hit@1, mean over tasks, %")
    axes.set_xlim(0, 102)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rounds(found: Result, titles: Mapping[str, str]) -> Figure:
    """A line for each arm, round by round."""
    del titles
    states = found["rows"]
    figure = Figure(figsize=(8, 3.0), layout="constrained")
    axes = figure.subplots()
    for shift, (arm, name) in zip((-0.03, 0.03), ROUND_ARMS.items(), strict=True):
        rows = [
            state[arm]["hit@1"] | {"hit@1": state[arm]["hit@1"]["mean"]}
            for state in states.values()
        ]
        _points(axes, [place + shift for place in range(len(rows))], rows, name)
    axes.set_xticks(range(len(states)), list(states))
    axes.set_ylabel("hit@1, mean over tasks, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def _points(axes: Axes, places: list[float], rows: list[Result], label: str) -> None:
    """Means joined by a line, with their intervals."""
    means, spread = _spread(rows)
    axes.errorbar(places, means, yerr=spread, fmt="o-", ms=4, capsize=2, label=label)


def _spread(rows: Sequence[Result]) -> tuple[list[float], list[list[float]]]:
    """Means in percent, and how far their intervals reach below and above."""
    means = [100 * row["hit@1"] for row in rows]
    ends = [
        [abs(100 * row["interval"][i] - mean) for row, mean in zip(rows, means, strict=True)]
        for i in (0, 1)
    ]
    return means, ends


_DRAW: dict[str, Callable[[Result, Mapping[str, str]], Figure]] = {
    "budget": _budget,
    "ablation": _ablation,
    "strength": _strength,
    "rounds": _rounds,
}
