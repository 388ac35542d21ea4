"""mini-MMEB, every task, with the built-in models.

    python -m benchmarks.mini

Downloads what the tasks are made of (190 MB in all, once), builds them, runs every arm, and writes
`benchmarks/results/mini_mmeb.json`. Scores do not depend on what else the machine does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment
from tte_jax.evaluation import mini, report

ARMS = ("none", "full64", "full64-ecrr10")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
      tasks: names, modalities or groups, as in `tte eval mini`.
      queries: of each task.
      pages: of R's manual in the pool; 0 = all 2,415.
      data: where the tasks are built; they stay there.
      runs: where their results are kept; another start goes on with what is missing. Default: a
        folder that is deleted afterwards.
    """

    tasks: str = "all"
    queries: int = 40
    pages: int = 200
    data: Path = Path(".tte/mini-mmeb-bench")
    runs: Path | None = None
    out: Path = field(default=environment.ROOT / "benchmarks/results/mini_mmeb.json")


def run(config: Config, results: Path) -> None:
    """All arms over all tasks, in a process of its own, as a user would."""
    command = [
        sys.executable, "-m", "tte_jax.cli.app", "eval", "mini", "--tasks", config.tasks,
        "--queries", str(config.queries), "--pages", str(config.pages),
        "--data", str(config.data), "--out", str(results),
        "--ecr", "none,full", "--rerank", "off,ecrr", "--budgets", "64", "--depths", "10",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def gathered(results: Path, data: Path) -> dict[str, Any]:
    """{"models": …, "tasks": {name: …}} of the result files and the manifest, in the tasks' order.

    Raises NotFoundError where an arm is missing.
    """
    runs = {arm: report.find_runs([results / arm])[0] for arm in ARMS}
    made = json.loads((data / "manifest.json").read_text("utf-8"))["tasks"]
    tasks: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for task in mini.TASKS:
        if task.name not in runs[ARMS[0]].tasks:
            continue
        infos = {arm: run.tasks[task.name].info for arm, run in runs.items()}
        about = infos[ARMS[0]]
        models = about["settings"]["models"]
        tasks[task.name] = {
            "modality": str(task.info.modality),
            "group": str(task.info.group),
            "like": task.info.like,
            "about": task.about,
            "metric": about["metric"],
            "queries": about["queries"],
            "pool": about["pool"],
            "chance": about["chance"],
            "failed": max(info["queries_failed"] for info in infos.values()),
            "packages": made[task.name]["packages"],
            "arms": {
                arm: {"score": info["score"], **info["interval"]} for arm, info in infos.items()
            },
        }
    return {"models": models, "tasks": tasks}


def main(arguments: Sequence[str] | None = None) -> None:
    config = tyro.cli(Config, args=arguments, description=__doc__)
    # What the figures depend on; where the files lie is nobody else's business.
    given = [
        word
        for name in ("tasks", "queries", "pages")
        if getattr(config, name) != getattr(Config, name)
        for word in (f"--{name}", str(getattr(config, name)))
    ]
    about = environment.describe("benchmarks.mini", given)
    with tempfile.TemporaryDirectory() as scratch:
        results = config.runs or Path(scratch)
        run(config, results)
        found = about | {"pages": config.pages} | gathered(results, config.data)
    config.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {config.out}; `python -m benchmarks.tables` shows it in docs/evaluation.md")


if __name__ == "__main__":
    main()
