"""Rounds of mined negatives of the built-in models, asked held-out queries before and after each.

    python -m benchmarks.rounds --data .data/emoji

`training.builtin.rounds` as `make train-builtin` runs it, from the shipped models. What is finished
under `--work` is not done again, so that an interrupted run goes on.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import environment
from training.builtin import compare, rounds
from training.configuration import ended
from training.mining.rounds import Round
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.errors import PreconditionError
from tte_jax.evaluation.significance import interval_of_tasks

METRICS = ("hit@1", rounds.MEASURE)


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `python -m training.data.emoji`.
      own: what `training.builtin.own` wrote of these models; None = it is made under `work`.
    """

    data: Path = Path(".data/emoji")
    models: Path = WEIGHTS_DIR
    own: Path | None = None
    work: Path = Path(".data/runs/rounds-measured")
    out: Path = Path("benchmarks/results/rounds.json")
    rounds: int = 2


def state(ranks: Mapping[str, Any]) -> dict[str, Any]:
    """Means over tasks, with bootstrap intervals, of what `training.builtin.evaluate` ranked."""
    made: dict[str, Any] = {}
    for arm in rounds.ARMS:
        made[arm] = {}
        for metric in METRICS:
            score = compare.METRICS[metric]
            tasks = {
                name: score(np.array(task["ranks"][arm])) for name, task in ranks["tasks"].items()
            }
            found = interval_of_tasks(list(tasks.values()))
            made[arm][metric] = {
                "mean": found.mean,
                "interval": [found.low, found.high],
                "tasks": {name: float(one.mean()) for name, one in tasks.items()},
            }
    return made


def gathered(folder: Path) -> dict[str, Any]:
    """What a finished `training.builtin.rounds` left in its folder."""
    told = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    states = {"begin": state(compare.read(folder / "begin/ranks.json"))}
    for row in told:
        here = folder / f"round-{row['round']}"
        states[f"round {row['round'] + 1}"] = state(compare.read(here / "ranks.json"))
        row["models"] = Round(here / "loop/rounds/round-00000").manifest["models"]
    asked = compare.read(folder / "begin/ranks.json")["tasks"]
    return {
        "asked": {name: len(task["answers"]) for name, task in asked.items()},
        "pool": {name: task["pool"] for name, task in asked.items()},
        "states": states,
        "rounds": [{k: v for k, v in row.items() if k != "from"} for row in told],
    }


def main(config: Config) -> int:
    own = config.own or config.work / "own.jsonl"
    if not own.is_file():
        own.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "training.builtin.own", "--data", str(config.data),
            "--model", str(config.models / REASONER), "--out", str(own),
        ]  # fmt: skip
        if code := subprocess.run(command, check=False).returncode:
            raise PreconditionError(
                f"the model's own reasonings were not made (exit code {code}); its output says why",
                reason="OWN_FAILED",
            )
    setting = rounds.Config(
        data=config.data,
        models=config.models,
        own=own,
        out=config.work,
        rounds=config.rounds,
    )
    asyncio.run(rounds.run(setting))
    made = {
        **environment.describe("benchmarks.rounds"),
        "noisy": False,  # nothing here is a time
        "queries": asdict(setting.queries),
        "steps": setting.steps,
        "rules": asdict(setting.rules),
        **gathered(config.work),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {config.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(ended(lambda: main(tyro.cli(Config))))
