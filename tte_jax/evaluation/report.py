"""The leaderboard's table out of result files, ours or anyone's: tasks, modality means, All.

A run is a folder that holds `{task}_score.json` files, by themselves or in folders `image`,
`video` and `visdoc`; below one folder there may be many runs (each arm is one). A modality's mean
is the plain mean over its data sets, and All the mean over the 78, so that the modalities weigh
36 : 18 : 24. A mean over a part is never called by the name of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError
from tte_jax.evaluation import outputs
from tte_jax.evaluation.metrics import Mode, Ranked, differs, per_query
from tte_jax.evaluation.mmeb_v2.registry import (
    ALIASES,
    BY_NAME,
    DATASETS,
    HIT,
    NDCG,
    Modality,
)
from tte_jax.evaluation.significance import (
    Difference,
    Interval,
    compare,
    interval,
    interval_of_tasks,
)

_SCORE, _PRED, _INFO, _FAILURES = "_score.json", "_pred.jsonl", "_info.json", "_failures.jsonl"
ALL = "All"
MARK = "*"


@dataclass(frozen=True)
class TaskScore:
    """One task of a run.

    Attributes:
      score: its metric, in 0 to 1, as the score file has it.
      info: our own file about it; empty for results of others.
      place: folder and file name without ending.
    """

    task: str
    modality: str
    metric: str
    score: float
    place: Path
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predictions(self) -> Path:
        return self.place.with_name(self.place.name + _PRED)

    @property
    def failures(self) -> Path:
        return self.place.with_name(self.place.name + _FAILURES)

    @property
    def mark(self) -> str:
        """Stands behind a score that lacks something; `footnotes` says what."""
        return MARK if outputs.lacks(self.info) else ""


@dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
      value: None when tasks are missing: there is no such mean then.
      partial: the mean over those that are there.
      missing: the tasks that are not.
    """

    value: float | None
    partial: float | None
    present: int
    total: int
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "partial": None if self.value is not None else self.partial,
            "present": self.present,
            "total": self.total,
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class Run:
    """The results of one system."""

    name: str
    tasks: Mapping[str, TaskScore]

    def mean(self, modality: str = ALL) -> Mean:
        """Of a modality, or of all 78."""
        wanted = [d.name for d in DATASETS if modality in (ALL, str(d.modality))]
        scores = [self.tasks[n].score for n in wanted if n in self.tasks]
        missing = tuple(n for n in wanted if n not in self.tasks)
        mean = float(np.mean(scores)) if scores else None
        return Mean(None if missing else mean, mean, len(scores), len(wanted), missing)

    def means(self) -> dict[str, Mean]:
        return {name: self.mean(name) for name in (*map(str, Modality), ALL)}


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs below the folders, named by their paths from each folder on; where two would have
    one name, by their whole paths.

    Raises:
      NotFoundError: a folder is not there or holds no score file.
      InvalidInputError: a run has two results of one task, or a folder is given twice.
    """
    runs: list[Run] = []
    places: list[Path] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise NotFoundError(f"There is no folder {folder}.", reason="FOLDER_NOT_FOUND")
        found: dict[Path, dict[str, TaskScore]] = {}
        for path in sorted(folder.rglob(f"*{_SCORE}")):
            score = _read(path)
            inside = path.parent.name in set(Modality) and path.parent != folder
            home = path.parent.parent if inside else path.parent
            tasks = found.setdefault(home, {})
            if score.task in tasks:
                raise InvalidInputError(
                    f"{home} has two results of {score.task}: {tasks[score.task].place}{_SCORE} "
                    f"and {path}. Keep one.",
                    reason="TWO_RESULTS",
                )
            tasks[score.task] = score
        if not found:
            raise NotFoundError(
                f"{folder} holds no result: expected files called {{task}}{_SCORE}, by themselves "
                "or in folders image, video and visdoc.",
                reason="NO_RESULTS",
            )
        for home, tasks in found.items():
            inner = home.relative_to(folder).as_posix()
            name = folder.resolve().name + ("" if inner == "." else f"/{inner}")
            files = {task.place.resolve() for task in tasks.values()}
            if files & seen:
                raise InvalidInputError(
                    f"The results in {home} would be shown twice; give each folder once, and none "
                    "that lies in another.",
                    field="folders",
                )
            seen |= files
            runs.append(Run(name, tasks))
            places.append(home)
    names = Counter(run.name for run in runs)
    return [
        Run(place.as_posix(), run.tasks) if names[run.name] > 1 else run
        for run, place in zip(runs, places, strict=True)
    ]


def _read(path: Path) -> TaskScore:
    stem = path.name.removesuffix(_SCORE)
    name = ALIASES.get(stem, stem)
    place = path.with_name(stem)
    about = path.with_name(stem + _INFO)
    info = outputs.read_json(about) if about.is_file() else {}
    known = BY_NAME.get(name)
    usual = NDCG if path.parent.name == Modality.VISDOC else HIT
    metric = known.metric if known else str(info.get("metric", usual))
    scores = outputs.read_json(path)
    if not isinstance(scores.get(metric), int | float):
        raise DataLossError(
            f"{path} has no number under {metric!r}, the metric of {name}; it has "
            f"{', '.join(scores) or 'nothing'}.",
            reason="UNREADABLE_RESULTS",
        )
    if not 0.0 <= scores[metric] <= 1.0:
        raise DataLossError(
            f"{path}: {metric} is {scores[metric]}; expected a share from 0 to 1, as the public "
            "scorer writes it, not percent.",
            reason="UNREADABLE_RESULTS",
        )
    modality = str(known.modality) if known else str(info.get("modality", path.parent.name))
    return TaskScore(name, modality, metric, float(scores[metric]), place, info)


def recompute(run: Run, mode: Mode) -> Run:
    """The run with the scores that its rankings give in `mode`, where it has rankings."""
    tasks: dict[str, TaskScore] = {}
    for name, task in run.tasks.items():
        if task.predictions.is_file():
            ranked = outputs.read_predictions(task.predictions, task.task)
            if ranked:
                scores = per_query(ranked, task.metric, mode)
                score, info = float(scores.mean()), dict(task.info)
                if info:
                    spread = asdict(interval(scores))
                    info |= {"metric_mode": str(mode), "score": score, "interval": spread}
                task = replace(task, score=score, info=info)
        tasks[name] = task
    return Run(run.name, tasks)


def both_modes(task: TaskScore) -> tuple[float, float] | None:
    """(exact, compat) where a task's rankings are there and the two can differ."""
    if not task.predictions.is_file():
        return None
    ranked = outputs.read_predictions(task.predictions, task.task)
    if not ranked or not differs(ranked):
        return None
    exact, compat = (
        float(per_query(ranked, task.metric, mode).mean()) for mode in (Mode.EXACT, Mode.COMPAT)
    )
    return exact, compat


@dataclass(frozen=True)
class Comparison:
    """Two runs, task by task and over the tasks that both have.

    Attributes:
      overall: bootstrap interval of the mean difference over tasks, each weighing the same.
      only_a, only_b: tasks that one of them lacks.
    """

    tasks: Mapping[str, Difference]
    overall: Interval
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def compare_runs(a: Run, b: Run, mode: Mode = Mode.EXACT) -> Comparison:
    """Paired, query by query, from the rankings of both.

    Raises:
      NotFoundError: a task of both has no rankings in one, or they share no task.
      InvalidInputError: the rankings are of different queries.
    """
    shared = [name for name in a.tasks if name in b.tasks]
    if not shared:
        raise NotFoundError(f"{a.name} and {b.name} share no task.", reason="NOTHING_SHARED")
    found: dict[str, Difference] = {}
    differences: list[np.ndarray] = []
    for name in shared:
        one, two = _rankings(a.tasks[name]), _rankings(b.tasks[name])
        if [sorted(r.label) for r in one] != [sorted(r.label) for r in two]:
            raise InvalidInputError(
                f"{name}: the queries of {a.name} ({len(one)}) and {b.name} ({len(two)}) are not "
                "the same, so that they cannot be compared pair by pair. Run both with the same "
                "data and --limit.",
                reason="UNPAIRED",
            )
        metric = a.tasks[name].metric
        x, y = per_query(one, metric, mode), per_query(two, metric, mode)
        found[name] = compare(x, y)
        differences.append(y - x)
    return Comparison(
        found,
        interval_of_tasks(differences),
        tuple(n for n in a.tasks if n not in b.tasks),
        tuple(n for n in b.tasks if n not in a.tasks),
    )


def footnotes(runs: Sequence[Run]) -> list[str]:
    """What the marked scores of each run lack, summed over its tasks."""
    notes: list[str] = []
    for run in runs:
        found: Counter[str] = Counter()
        marked = 0
        for task in run.tasks.values():
            lacks = outputs.lacks(task.info)
            found.update(lacks)
            marked += bool(lacks)
        if marked:
            what = ", ".join(f"{name}: {count}" for name, count in found.items())
            notes.append(f"{MARK} {run.name}, {marked} of {len(run.tasks)} tasks: {what}.")
    return notes


def _rankings(task: TaskScore) -> list[Ranked]:
    if not task.predictions.is_file():
        raise NotFoundError(
            f"There is no {task.predictions}; a comparison needs the rankings of both runs.",
            reason="FILE_NOT_FOUND",
        )
    return outputs.read_predictions(task.predictions, task.task)


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """What `tte eval report --json` says."""
    return {
        "runs": [
            {
                "name": run.name,
                "tasks": {
                    name: {
                        "modality": task.modality,
                        "metric": task.metric,
                        "score": task.score,
                        "interval": task.info.get("interval"),
                        "metric_mode": task.info.get("metric_mode"),
                        "tokens_per_query": task.info.get("tokens_per_query"),
                        "seconds_per_query": task.info.get("seconds_per_query"),
                        "lacks": outputs.lacks(task.info),
                    }
                    for name, task in run.tasks.items()
                },
                "means": {name: mean.as_json() for name, mean in run.means().items()},
            }
            for run in runs
        ]
    }
