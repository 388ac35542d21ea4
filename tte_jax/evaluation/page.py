"""The HTML report: one file with everything in it, fit to be sent to someone.

What each run is worth and costs; quality against tokens and against latency (one point a run, over
the tasks that all runs have); scores and bars per task; wrong answers with their pictures and
reasonings. Nothing is fetched and no script runs: texts from data are escaped, only pictures that
are in the file are shown, and the page's own policy forbids the rest.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.errors import DataLossError
from tte_jax.evaluation import outputs, plots
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DATASETS, Modality
from tte_jax.evaluation.report import ALL, Run, TaskScore, footnotes

FAILURES = 5
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# What `outputs.thumbnail` writes, or another system's raster images.
_PICTURE = re.compile(r"data:image/(?:jpeg|png|webp|gif);base64,[A-Za-z0-9+/=]+")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222;
  padding: 0 1rem }
h2 { margin-top: 2.2rem } p { max-width: 46rem } .note { color: #555 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th { vertical-align: bottom; border-bottom: 1px solid #999 }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
tr.mean td { font-weight: 600; border-top: 1px solid #999 }
small { color: #666; font-weight: normal } img.plot { max-width: 100%; height: auto }
td.long { text-align: left; white-space: normal; overflow-wrap: anywhere; font: 12px/1.4 monospace }
summary { cursor: pointer; padding: .3rem 0 }
.case { display: flex; gap: .8rem; border-top: 1px solid #ddd; padding: .8rem 0; flex-wrap: wrap }
.card { width: 12.5rem; font-size: 13px; overflow-wrap: anywhere; padding: .4rem;
  border: 1px solid #e2e2e2; border-radius: 4px }
.card img { display: block; max-width: 100%; height: 7rem; object-fit: contain; margin: 0 auto }
.card b { display: block } .right { border: 2px solid #2a7 } .query { background: #f6f8fb }
.ecr { color: #555; white-space: pre-wrap; max-height: 9rem; overflow-y: auto; margin-top: .3rem;
  border-top: 1px dotted #ccc }
"""


def write(path: Path, runs: Sequence[Run]) -> None:
    """Writes the page. Raises DataLossError for a failures file that cannot be read."""
    shared = [n for n in runs[0].tasks if all(n in run.tasks for run in runs)]
    labels = _labels(runs)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        "<meta name='viewport' content='width=device-width'><title>Retrieval quality</title>",
        f"<style>{_STYLE}</style></head><body><h1>Retrieval quality</h1>",
        _overview(runs, labels, shared),
        _about(runs, labels),
        *_costs(runs, labels, shared),
        "<h2>Tasks</h2>",
        _table(runs, labels),
        *_bars(runs, labels),
    ]
    cases = [
        found
        for name in _names(runs)
        for run, label in zip(runs, labels, strict=True)
        if name in run.tasks and (found := _failures(run.tasks[name], label))
    ]
    if cases:
        parts += [
            "<h2>Wrong answers</h2>",
            f"<p class='note'>The first {FAILURES} of each task and run: what was asked, a right "
            "answer, and what stood first instead, with the reasonings (ECRs) that led there.</p>",
            *cases,
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n</body></html>\n", "utf-8")


def _labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, without the folder that all of them lie in."""
    first = runs[0].name.partition("/")[0] + "/"
    if len(runs) > 1 and all(run.name.startswith(first) for run in runs):
        return [run.name.removeprefix(first) for run in runs]
    return [run.name for run in runs]


def _names(runs: Sequence[Run]) -> list[str]:
    known = [d.name for d in DATASETS if any(d.name in run.tasks for run in runs)]
    return known + sorted({n for run in runs for n in run.tasks} - set(known))


def _number(info: Mapping[str, Any], *keys: str) -> float:
    """A number of a result file; NaN where it has none."""
    found: Any = info
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else math.nan


# --- what the runs are ---


def _overview(runs: Sequence[Run], labels: Sequence[str], shared: Sequence[str]) -> str:
    """A row a run: means, and what a query costs."""
    means = [*map(str, Modality), ALL] if any(n in BY_NAME for n in _names(runs)) else []
    head = ["run", "tasks", *means]
    if shared:
        head += [f"mean of {_tasks(shared)}", "tokens a query", "seconds a query"]
    rows = [_row("th", head)]
    for run, label in zip(runs, labels, strict=True):
        cells = [html.escape(label), str(len(run.tasks))]
        for mean in means:
            found = run.mean(mean)
            whole = f"{100 * found.value:.2f}" if found.value is not None else "–"
            part = f" <small>{found.present} of {found.total}</small>"
            cells.append(whole + ("" if found.value is not None else part))
        if shared:
            tokens, seconds = (_spent(run, shared, *keys) for keys in _COSTS)
            cells += [f"{_quality(run, shared):.2f}", _known(tokens, 1), _known(seconds, 3)]
        rows.append(_row("td", cells))
    note = ""
    if len(runs) > 1:
        note = (
            "<p class='note'>The last columns are means over what all runs have: "
            f"{_tasks(shared)}.</p>"
            if shared
            else "<p class='note'>No task is in all runs, so that they cannot be set against each "
            "other.</p>"
        )
    return f"<div class='wide'><table>{''.join(rows)}</table></div>{note}"


def _about(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """What was run, with what: the settings that the results carry."""
    rows: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        infos = [task.info for task in run.tasks.values() if task.info]
        text = "results of another system: settings not known"
        if infos:
            settings = {key: infos[0].get(key) for key in ("arm", "settings")}
            text = json.dumps(settings, ensure_ascii=False)
        cells = f"<td>{html.escape(label)}</td><td class='long'>{html.escape(text)}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return f"<details><summary>Settings</summary><table>{''.join(rows)}</table></details>"


def _row(kind: str, cells: Sequence[str], name: str = "") -> str:
    """A table's row; the cells are HTML already."""
    inner = "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
    return f"<tr class='{name}'>{inner}</tr>"


def _tasks(names: Sequence[str]) -> str:
    return f"{len(names)} task" + "s" * (len(names) != 1)


def _known(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


# --- quality against cost ---

_COSTS = (("tokens_per_query",), ("seconds_per_query", "mean"))


def _spent(run: Run, shared: Sequence[str], *keys: str) -> float:
    return float(np.mean([_number(run.tasks[name].info, *keys) for name in shared]))


def _quality(run: Run, shared: Sequence[str]) -> float:
    return 100 * float(np.mean([run.tasks[name].score for name in shared]))


def _costs(runs: Sequence[Run], labels: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Both plots, each with the runs whose costs are known."""
    parts: list[str] = []
    if not shared:
        return parts
    titles = ("Quality against tokens", "Quality against latency")
    axes = ("generated tokens per query", "seconds per query")
    for title, axis, keys in zip(titles, axes, _COSTS, strict=True):
        points = [
            plots.Point(i, label, cost, _quality(run, shared))
            for i, (run, label) in enumerate(zip(runs, labels, strict=True))
            if not math.isnan(cost := _spent(run, shared, *keys))
        ]
        if points:
            parts += [f"<h2>{title}</h2>", _plot(plots.scatter(points, axis), title)]
            parts.append(f"<p class='note'>Mean over {_tasks(shared)}.</p>")
    return parts


# --- tasks ---


def _table(runs: Sequence[Run], labels: Sequence[str]) -> str:
    rows = [_row("th", ["task", "metric", *map(html.escape, labels)])]
    for name in _names(runs):
        found = [run.tasks.get(name) for run in runs]
        metric = next(task.metric for task in found if task is not None)
        cells = [html.escape(name), html.escape(metric), *map(_cell, found)]
        rows.append(_row("td", cells))
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in footnotes(runs))
    return f"<div class='wide'><table>{''.join(rows)}</table></div>{notes}"


def _cell(task: TaskScore | None) -> str:
    if task is None:
        return ""
    low, high = _end(task, "low"), _end(task, "high")
    spread = "" if math.isnan(low + high) else f" <small>{low:.1f}–{high:.1f}</small>"
    return f"{100 * task.score:.2f}{task.mark}{spread}"


def _bars(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """A plot for each modality."""
    groups: dict[str, list[str]] = {}
    for name in _names(runs):
        first = next(run.tasks[name] for run in runs if name in run.tasks)
        groups.setdefault(first.modality, []).append(name)
    parts: list[str] = []
    for modality, names in groups.items():
        made = [
            plots.Bars(
                label,
                [100 * run.tasks[n].score if n in run.tasks else math.nan for n in names],
                [_end(run.tasks.get(n), "low") for n in names],
                [_end(run.tasks.get(n), "high") for n in names],
            )
            for run, label in zip(runs, labels, strict=True)
        ]
        title = f"Scores of the {modality} tasks" if modality else "Scores"
        parts += [f"<h3>{html.escape(title)}</h3>", _plot(plots.bars(names, made), title)]
    return parts


def _end(task: TaskScore | None, end: str) -> float:
    """An end of a score's interval, in percent; NaN where it is not known."""
    return math.nan if task is None else 100 * _number(task.info, "interval", end)


def _plot(svg: bytes, title: str) -> str:
    data = base64.b64encode(svg).decode()
    alt = html.escape(title, quote=True)
    return f"<img class='plot' alt='{alt}' src='data:image/svg+xml;base64,{data}'>"


# --- wrong answers ---


def _failures(task: TaskScore, label: str) -> str:
    if not task.failures.is_file():
        return ""
    cases: list[str] = []
    for number, line in enumerate(outputs.lines(task.failures), start=1):
        if len(cases) == FAILURES:
            break
        try:
            cases.append(_case(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLossError(
                f"{task.failures}, line {number}, cannot be read ({type(error).__name__}: "
                f"{error}); delete the file, or run the task again.",
                reason="UNREADABLE_RESULTS",
            ) from error
    if not cases:
        return ""
    title = html.escape(f"{task.task}, {label}")
    return f"<details><summary>{title}</summary>{''.join(cases)}</details>"


def _case(row: Mapping[str, Any]) -> str:
    images = row.get("images", {})
    said = row["text"] or row["instruction"]
    cards = [_card("query", "query", said, row["image"], row["ecr"])]
    for id in row["label"][:1]:
        rank = f"at rank {row['rank']}" if row["rank"] else "not ranked"
        cards.append(_card("right", f"right, {rank}", id, images.get(id, ""), ""))
    for place, result in enumerate(row["results"], start=1):
        scores = f"{place}. cosine {result['cosine']:.3f}"
        if (yes := result["rerank"]) is not None:
            scores += f", yes {yes:.3f}"
        id = result["id"]
        cards.append(_card("result", scores, id, images.get(id, ""), result["ecr"]))
    return f"<div class='case'>{''.join(cards)}</div>"


def _card(kind: str, title: str, text: str, image: str, ecr: str) -> str:
    shown = ""
    if _PICTURE.fullmatch(image):
        shown = f"<img alt='{html.escape(title, quote=True)}' src='{image}'>"
    said = f"<div class='ecr'>{html.escape(ecr)}</div>" if ecr else ""
    body = f"<b>{html.escape(title)}</b>{shown}{html.escape(text[:400])}{said}"
    return f"<div class='card {kind}'>{body}</div>"
