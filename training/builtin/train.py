"""The built-in models, from nothing to evaluated weights in one command.

    python -m training.builtin.train --data .data/emoji --out .data/runs/builtin

Every stage is one of the modules beside this one, as a process of its own (`stages`): tokenizer →
vision tower → reasoner and embedder in one → its own reasonings → the last fifth on those → rows
for the reranker → reranker → rounds of mined negatives → held-out figures. With `--start` all
models go on from those of a folder, and the first two stages fall away. The same command goes on
with an interrupted run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from training import rerank
from training.builtin import SIDE, unified, vision
from training.builtin.stages import Stage, run
from training.configuration import ended
from tte_jax.builtin.models import REASONER, RERANKER
from tte_jax.errors import InvalidInputError, NotFoundError

WARMUP = 20
"""Steps in which the rate rises where the unified model goes on from one."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    The defaults are cut so that all stages from nothing fit into three hours on two idle cores,
    where a step of the tower takes 1.1 s and one of the unified model 3.2 s.

    Attributes:
      tower_steps, tower_batch: of the vision tower.
      unified_steps: of the unified model; 0 = 1,200 from nothing, 720 from `start`.
      own_share: the last so much of them is trained on the model's own reasonings.
      own: pictures, texts and changes that the model is asked about for that.
      reranker_steps: 0 = 600 from `start`'s reranker, 1,000 from the unified model.
      rows: text, image and composed queries that the reranker learns from, and drawings that
        look for their name.
      rounds: of rHNM; each is kept only if the retriever is not worse for it.
      limit, composed: queries of each task of the evaluation.
    """

    tower_steps: int = 1500
    tower_batch: int = 256
    unified_steps: int = 0
    own_share: float = 0.2
    own: tuple[int, int, int] = (3000, 1000, 1800)
    reranker_steps: int = 0
    rows: tuple[int, int, int, int] = (900, 700, 1400, 700)
    rounds: int = 2
    limit: int = 300
    composed: int = 200


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      data: folder built by `training.data.emoji`.
      out: folder of the run. `models/` in it holds the two model directories at the end,
        `quality.json` their figures, `ranks.json` those of each query (`training.builtin.compare`).
      start: folder with the two model directories to go on from; None = from nothing.
      version: written into the models.
      dry_run: print the commands and stop.
    """

    data: Path = Path(".data/emoji")
    out: Path = Path(".data/runs/builtin")
    start: Path | None = None
    version: str = "1"
    sizes: Sizes = field(default_factory=Sizes)
    dry_run: bool = False


def check(config: Config) -> None:
    """Raises NotFoundError or InvalidInputError for what would fail only after hours."""
    if not (config.data / "manifest.json").is_file():
        raise NotFoundError(
            f"{config.data} holds no finished emoji data set; make it with "
            f"`python -m training.data.emoji --out {config.data}`"
        )
    for name in (REASONER, RERANKER) if config.start else ():
        if not (config.start / name / "config.json").is_file():  # type: ignore[operator]
            raise NotFoundError(
                f"--start {config.start} has no model directory {name}; expected a folder with"
                f" {REASONER} and {RERANKER}, such as tte_jax/builtin/weights"
            )
    if config.out.exists() and not config.out.is_dir():
        raise InvalidInputError(f"--out {config.out} is a file; give a folder", field="out")
    if not config.version.strip():
        raise InvalidInputError("--version is empty; give a word such as 5", field="version")
    sizes = config.sizes
    if not 0.0 < sizes.own_share < 1.0:
        raise InvalidInputError(
            f"--sizes.own-share {sizes.own_share} must lie between 0 and 1", field="sizes.own_share"
        )
    for name, low in {"tower_batch": 1, "rounds": 0, "limit": 1, "composed": 1}.items():
        if getattr(sizes, name) < low:
            raise InvalidInputError(
                f"--sizes.{name.replace('_', '-')} {getattr(sizes, name)} is less than {low}",
                field=f"sizes.{name}",
            )
    rises = {
        "tower_steps": vision.Config.warmup,
        "unified_steps": WARMUP if config.start else unified.Config.warmup,
        "reranker_steps": rerank.Config.warmup,
    }
    for name, rise in rises.items():
        steps = getattr(sizes, name)
        if steps <= rise and (steps or name == "tower_steps"):
            raise InvalidInputError(
                f"--sizes.{name.replace('_', '-')} {steps} is not more than the {rise} steps in "
                "which the learning rate rises",
                field=f"sizes.{name}",
            )


def recipe(config: Config) -> list[Stage]:
    """All stages in order, each with every option that is not its module's default."""
    out, start, sizes = config.out, config.start, config.sizes
    data = ("--data", str(config.data))
    tokenizer = out / "tokenizer" if start is None else start / REASONER
    reading = ("--tokenizer", str(tokenizer))
    unified, reasoning, first, models = (
        out / name for name in ("unified", "reasoning", "first", "models")
    )
    weights = unified / "export" / "model.safetensors"
    stages = []

    def add(name: str, module: str, *options: object, makes: Path) -> None:
        stages.append(Stage(name, module, tuple(str(o) for o in options), makes))

    def add_export(name: str, to: Path, reranker: Path | None) -> None:
        add(
            name, "training.builtin.export", "--unified", weights.parent, "--reranker", reranker,
            *reading, "--out", to, "--version", config.version,
            makes=to / (REASONER if reranker is None else RERANKER) / "tte.json",
        )  # fmt: skip

    if start is None:
        add(
            "tokenizer", "training.builtin.tokenizer", *data, "--out", tokenizer,
            makes=tokenizer / "tokenizer.json",
        )  # fmt: skip
        add(
            "tower", "training.builtin.vision", *data, *reading, "--out", out / "vision",
            "--phases", SIDE, sizes.tower_steps, sizes.tower_batch,
            makes=out / "vision" / "visual.npz",
        )  # fmt: skip
        begin = (*reading, "--vision", out / "vision" / "visual.npz")
        steps = sizes.unified_steps or 1200
    else:
        begin = ("--start", start / REASONER, "--lr", 1.5e-3, "--warmup", WARMUP)
        steps = sizes.unified_steps or 720
    learn = (*data, *begin, "--out", unified, "--steps", steps)
    until = max(1, round(steps * (1 - sizes.own_share)))
    own = out / "own.jsonl"
    add("unified", "training.builtin.unified", *learn, "--until", until, makes=weights)
    add_export("export-unified", reasoning, None)
    add(
        "own", "training.builtin.own", *data, "--model", reasoning / REASONER, "--out", own,
        "--image", sizes.own[0], "--text", sizes.own[1], "--composed", sizes.own[2],
        makes=own,
    )  # fmt: skip
    add("unified-own", "training.builtin.unified", *learn, "--own", own, makes=weights)
    add_export("export-own", first, None)
    rows, rerank = out / "rerank" / "rows.jsonl", out / "rerank"
    add(
        "rerank-rows", "training.builtin.rerank_rows", *data, "--model", first / REASONER,
        "--out", rows, "--text", sizes.rows[0], "--image", sizes.rows[1],
        "--composed", sizes.rows[2], "--named", sizes.rows[3],
        makes=rows,
    )  # fmt: skip
    add(
        "reranker", "training.rerank", "--rows", rows, *reading, "--out", rerank,
        "--start", first / REASONER if start is None else start / RERANKER,
        "--steps", sizes.reranker_steps or (1000 if start is None else 600),
        makes=rerank / "export" / "model.safetensors",
    )  # fmt: skip
    add_export("export", first if sizes.rounds else models, rerank / "export")
    if sizes.rounds:
        add(
            "rounds", "training.builtin.rounds", *data, "--models", first, "--own", own,
            "--out", out / "rounds", "--result", models, "--rounds", sizes.rounds,
            "--skip", sizes.limit,
            makes=models / REASONER / "tte.json",
        )  # fmt: skip
    add(
        "evaluate", "training.builtin.evaluate", *data, "--models", models,
        "--out", out / "quality.json", "--ranks", out / "ranks.json",
        "--limit", sizes.limit, "--composed", sizes.composed,
        makes=out / "quality.json",
    )  # fmt: skip
    return stages


def main(config: Config) -> int:
    """Runs it; returns the exit code of `tte_jax.cli.exits`."""

    def work() -> None:
        check(config)
        stages = recipe(config)
        if config.dry_run:
            print("\n".join(stage.command for stage in stages))
        else:
            run(stages, config.out)
            print(f"the models are in {config.out / 'models'}")

    return ended(work)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
