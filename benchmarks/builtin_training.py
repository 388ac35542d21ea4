"""The built-in models from nothing, as `make train-builtin` trains them: how long, and how good.

    python -m benchmarks.builtin_training --data .data/emoji

Runs `training.builtin.train` in `--work` and tells the seconds of every stage and the held-out
figures of the models that come out. An interrupted run goes on; a stage's seconds are then those of
all its processes, also of the work that was lost between the last checkpoint and the interruption.
Making the data set is no part of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment
from training.builtin import train
from training.builtin.stages import Journal, Stage, run
from training.configuration import ended

ARMS = ("none", "ecr", "ecr+ecrr")
SHIPPED = environment.ROOT / "benchmarks/results/builtin_quality.json"


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `python -m training.data.emoji`.
      noisy: say so when other work ran on the machine during any of the stages.
    """

    data: Path = Path(".data/emoji")
    work: Path = Path(".data/runs/builtin-measured")
    out: Path = Path("benchmarks/results/builtin_training.json")
    sizes: train.Sizes = field(default_factory=train.Sizes)
    noisy: bool = False


def quality(report: Mapping[str, Any]) -> dict[str, Any]:
    """{"models", "tasks": {name: {arm: {"hit@1", "hit@10"}}}} of what `builtin.evaluate` wrote."""
    return {
        "models": report["models"],
        "tasks": {
            name: {
                arm: {k: figures[arm][k] for k in ("hit@1", "hit@10")}
                for arm in ARMS
                if arm in figures
            }
            for name, figures in report["tasks"].items()
        },
    }


def gathered(stages: Sequence[Stage], work: Path) -> dict[str, Any]:
    """What a finished run left in its folder."""
    spent = Journal(work).spent()
    rounds = work / "rounds/rounds.jsonl"
    told = rounds.read_text().splitlines() if rounds.exists() else []
    return {
        "stages": [
            {"name": stage.name, "command": stage.command, **spent[stage.name]} for stage in stages
        ],
        "seconds": round(sum(spent[stage.name]["seconds"] for stage in stages), 1),
        "rounds_kept": [json.loads(line)["kept"] for line in told],
        "quality": quality(json.loads((work / "quality.json").read_text())),
    }


def main(config: Config) -> None:
    recipe = train.Config(data=config.data, out=config.work, sizes=config.sizes)
    train.check(recipe)
    stages = train.recipe(recipe)
    load = environment.foreign_load()
    run(stages, config.work)
    made = {
        **environment.describe("benchmarks.builtin_training"),
        "foreign_load": load,
        "noisy": config.noisy or environment.noisy(load),
        **gathered(stages, config.work),
    }
    if SHIPPED.is_file():
        made["shipped"] = quality(json.loads(SHIPPED.read_text()))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if made['noisy'] else ''}.")


if __name__ == "__main__":
    sys.exit(ended(lambda: main(tyro.cli(Config))))
