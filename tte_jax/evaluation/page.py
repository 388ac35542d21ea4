"""The HTML report: one file with its figures in it, fit to be sent to someone.

Quality against tokens and against latency (one point a run, over the tasks that all runs have),
bars per task, and wrong answers with their pictures and reasonings.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tte_jax.errors import DataLossError
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DATASETS, Modality
from tte_jax.evaluation.report import ALL, Run, TaskScore

FAILURES = 5
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .7rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
tr.mean td { font-weight: 600; border-top: 1px solid #999 } img.plot { max-width: 100% }
.case { display: flex; gap: 1rem; border-top: 1px solid #ddd; padding: .6rem 0; flex-wrap: wrap }
.card { width: 13rem; font-size: 13px; overflow-wrap: anywhere } .card img { display: block }
.right { outline: 2px solid #2a7 } .ecr { color: #555; white-space: pre-wrap }
"""


def write(path: Path, runs: Sequence[Run]) -> None:
    """Writes the page. Raises DataLossError for a failures file that cannot be read."""
    shared = [n for n in runs[0].tasks if all(n in run.tasks for run in runs)]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>tte eval</title>",
        f"<style>{_STYLE}</style><h1>Retrieval quality</h1>",
        _table(runs),
        _about(runs),
    ]
    tokens, seconds = _points(runs, shared)
    caption = f"Mean over the {len(shared)} tasks that all runs have."
    if len(tokens) > 0:
        figure = _scatter(tokens, "generated tokens per query")
        parts += ["<h2>Quality against tokens</h2>", _plot(figure), f"<p>{caption}</p>"]
    if len(seconds) > 0:
        figure = _scatter(seconds, "seconds per query")
        parts += ["<h2>Quality against latency</h2>", _plot(figure), f"<p>{caption}</p>"]
    parts += ["<h2>Tasks</h2>", _plot(_bars(runs)), "<h2>Wrong answers</h2>"]
    parts += [_failures(run, task) for run in runs for task in run.tasks.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", "utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    known = [d.name for d in DATASETS if any(d.name in run.tasks for run in runs)]
    return known + sorted({n for run in runs for n in run.tasks} - set(known))


def _table(runs: Sequence[Run]) -> str:
    rows = [_row("th", ["task", *(run.name for run in runs)])]
    for name in _names(runs):
        rows.append(_row("td", [name, *(_cell(run.tasks.get(name)) for run in runs)]))
    if any(name in BY_NAME for name in _names(runs)):
        for mean in (*map(str, Modality), ALL):
            cells = [mean]
            for run in runs:
                found = run.mean(mean)
                part = f"– ({found.present} of {found.total})"
                cells.append(part if found.value is None else f"{100 * found.value:.2f}")
            rows.append(_row("td", cells, "mean"))
    return f"<table>{''.join(rows)}</table>"


def _cell(task: TaskScore | None) -> str:
    if task is None:
        return ""
    interval = task.info.get("interval") or {}
    spread = ""
    if "low" in interval and "high" in interval:
        spread = f" ({100 * interval['low']:.1f}–{100 * interval['high']:.1f})"
    return f"{100 * task.score:.2f}{spread}"


def _row(kind: str, cells: Sequence[str], name: str = "") -> str:
    inner = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
    return f"<tr class='{name}'>{inner}</tr>"


def _about(runs: Sequence[Run]) -> str:
    """What was run, with what: the settings that the results carry."""
    rows: list[str] = []
    for run in runs:
        infos = [task.info for task in run.tasks.values() if task.info]
        if not infos:
            rows.append(_row("td", [run.name, "results of another system: settings not known"]))
            continue
        settings = {"arm": infos[0].get("arm", {}), **infos[0].get("settings", {})}
        rows.append(_row("td", [run.name, json.dumps(settings, ensure_ascii=False)]))
    return f"<details><summary>Settings</summary><table>{''.join(rows)}</table></details>"


Point = tuple[str, float, float]
"""Name, cost, quality in percent."""


def _points(runs: Sequence[Run], shared: Sequence[str]) -> tuple[list[Point], list[Point]]:
    tokens: list[Point] = []
    seconds: list[Point] = []
    for run in runs:
        infos = [run.tasks[name].info for name in shared]
        if not infos or not all("tokens_per_query" in info for info in infos):
            continue
        quality = 100 * float(np.mean([run.tasks[name].score for name in shared]))
        spent = float(np.mean([info["tokens_per_query"] for info in infos]))
        took = float(np.mean([info["seconds_per_query"]["mean"] for info in infos]))
        tokens.append((run.name, spent, quality))
        seconds.append((run.name, took, quality))
    return tokens, seconds


def _scatter(points: Sequence[Point], label: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, cost, quality in points:
        axes.plot([cost], [quality], "o")
        axes.annotate(name, (cost, quality), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("mean score, %")
    axes.grid(alpha=0.3)
    axes.margins(0.15)
    return figure


def _bars(runs: Sequence[Run]) -> Figure:
    names = _names(runs)
    height = max(2.0, 0.16 * len(names) * (len(runs) + 1))
    figure = Figure(figsize=(8, min(height, 120.0)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names), dtype=float)
    thick = 0.8 / len(runs)
    for i, run in enumerate(runs):
        values = [100 * run.tasks[n].score if n in run.tasks else np.nan for n in names]
        axes.barh(places + i * thick, values, thick, label=run.name)
    axes.set_yticks(places + 0.4 - thick / 2, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("score, %")
    axes.legend(fontsize=8)
    return figure


def _plot(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    data = base64.b64encode(out.getvalue()).decode()
    return f"<img class='plot' alt='' src='data:image/png;base64,{data}'>"


# --- wrong answers ---


def _failures(run: Run, task: TaskScore) -> str:
    if not task.failures.is_file():
        return ""
    cases: list[str] = []
    for number, line in enumerate(task.failures.read_text("utf-8").splitlines(), start=1):
        if len(cases) == FAILURES:
            break
        try:
            cases.append(_case(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataLossError(
                f"{task.failures}, line {number}, cannot be read ({type(error).__name__}: "
                f"{error}); delete the file, or run the task again.",
                reason="UNREADABLE_RESULTS",
            ) from error
    if not cases:
        return ""
    title = html.escape(f"{task.task}, {run.name}")
    return f"<details><summary>{title}</summary>{''.join(cases)}</details>"


def _case(row: dict[str, Any]) -> str:
    images = row.get("images", {})
    said = row["text"] or row["instruction"]
    cards = [_card(f"query: {said}", row["image"], row["ecr"])]
    for id in row["label"][:1]:
        cards.append(_card(f"right, rank {row['rank'] or '–'}: {id}", images.get(id, ""), "", True))
    for place, result in enumerate(row["results"], start=1):
        rerank = result["rerank"]
        scores = f"cos {result['cosine']:.3f}" + (f", yes {rerank:.3f}" if rerank else "")
        title = f"{place}. {result['id']} ({scores})"
        cards.append(_card(title, images.get(result["id"], ""), result["ecr"]))
    return f"<div class='case'>{''.join(cards)}</div>"


def _card(title: str, image: str, ecr: str, right: bool = False) -> str:
    # Only pictures that this package wrote: nothing is fetched from anywhere.
    good = image.startswith("data:image/")
    shown = f"<img alt='' src='{html.escape(image)}'>" if good else ""
    name = "card right" if right else "card"
    text = f"<div class='ecr'>{html.escape(ecr)}</div>" if ecr else ""
    return f"<div class='{name}'>{shown}{html.escape(title[:400])}{text}</div>"
