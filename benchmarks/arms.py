"""Where hard negatives should come from: none, random, the embedder's, the reranker's without and
with its filter of false negatives.

    python -m benchmarks.arms --data .data/emoji

The built-in models: the embedder is trained on for a few steps from one start, on the same
examples in the same order, and asked held-out queries. Neither mining nor the loss is told which
drawings show the same thing, so other artists' drawings of what is wanted are false negatives, as
they are wherever only one right answer a query is known. All arms come from one mining. Every
finished piece is kept; an interrupted run goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import environment
from benchmarks.short_runs import Recipe, ShortRuns, difference, start_of, summary
from training import loop
from training.builtin.heldout import HeldOut
from training.builtin.reasonings import weights_of, with_ecrs, write_ecrs
from training.data import emoji
from training.data.rows import ExampleSource
from training.data.sources import open_source
from training.launch import without_avx512
from training.mining import arms, candidates
from training.mining.mined_source import MinedSource
from training.mining.records import NONE, RERANKER, Rules
from training.mining.rounds import Round, sealed
from training.mining.table import Table, table_of
from training.mining.ungrouped import Ungrouped
from training.mining.workspace import Workspace
from tte_jax.builtin import models
from tte_jax.engine.executables import enable_compile_cache

NEAR = 10


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `training.data.emoji`.
      work: the mined round and every run's ranks, in a folder for each state of the weights.
      ecrs: reasonings by content; `benchmarks.false_negatives` reads the same ones.
      text, composed: training queries of each kind; families: of so many families of concepts, few
        enough for other artists' drawings of what is wanted to be in the corpus.
      percent_of_positive: t of the filter; depth: candidates of a query.
      budget: reasoning tokens.
      asked: held-out queries of each task; pool: pictures that they choose among beside the right
        ones of all queries, 0 = all of the style.
      reranker: address of a running one; "" = one is started.
    """

    data: Path = Path(".data/emoji")
    work: Path = Path(".data/runs/arms")
    ecrs: Path = Path(".data/runs/emoji-ecrs")
    out: Path = Path("benchmarks/results/arms.json")
    model: str = models.EMBEDDER
    text: int = 800
    composed: int = 800
    families: int = 300
    percent_of_positive: float = 1.0
    depth: int = 100
    budget: int = 64
    asked: int = 400
    pool: int = 0
    seed: int = 0
    reranker: str = ""
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def source(self) -> str:
        counts = f"text={self.text}&composed={self.composed}&families={self.families}"
        return f"emoji:{self.data}?{counts}&seed={self.seed}"


def mined(
    config: Config, source: ExampleSource, work: Path
) -> tuple[Table, dict[str, ExampleSource]]:
    """One round of the reranker over the source, and every arm's source."""
    rules = Rules(
        arm=RERANKER,
        negatives=config.recipe.negatives,
        percent_of_positive=config.percent_of_positive,
        depth=config.depth,
        seed=config.seed,
    )
    setting = loop.Config(
        data=config.source,
        state=work / "loop",
        model=config.model,
        reranker=config.reranker,
        rules=rules,
    )
    space = Workspace(setting.state)
    with space.locked():
        space.claim({"data": config.source, "rules": asdict(rules), "budget": config.budget})
        table = space.table(source)
        if not sealed(space.rounds):
            opened = loop.embedder_opener(setting)
            asyncio.run(loop.mine_round(setting, space, source, table, 0, opened))
    found = candidates.load(space.candidates(0))
    round = Round(space.round(0))
    return table, asyncio.run(arms.sources(source, table, *found, round, work / "arms"))


def about(
    source: ExampleSource, table: Table, groups: dict[str, str], found: np.ndarray
) -> dict[str, float]:
    """An arm's negatives: how many a query has, and the shares of them that show what is wanted and
    that are among the `NEAR` nearest of `found` [Q depth]."""
    counts: Counter[str] = Counter()
    if isinstance(source, MinedSource):
        for index, query in enumerate(table.queries):
            wanted = groups[table.documents[query.positives[0]].key]
            near = {table.documents[j].key for j in found[index, :NEAR]}
            chosen = source[index].negatives
            counts["all"] += len(chosen)
            counts["same"] += sum(groups[one.key] == wanted for one in chosen)
            counts["near"] += sum(one.key in near for one in chosen)
    return {
        "negatives": counts["all"] / len(table.queries),
        "false": counts["same"] / max(1, counts["all"]),
        "near": counts["near"] / max(1, counts["all"]),
    }


def main(config: Config) -> int:
    without_avx512(os.environ)
    begun, work = time.monotonic(), config.work / weights_of(config.model)
    enable_compile_cache(config.work / "compile-cache")
    data = emoji.load(config.data)
    grouped = open_source(config.source)
    heldout = HeldOut(data, queries=config.asked, pool=config.pool, seed=config.seed)
    options: dict[str, Any] = {"model": config.model, "budget": config.budget}
    source = with_ecrs(Ungrouped(grouped), config.ecrs, **options)
    store = write_ecrs(heldout.wanted(), config.ecrs, **options)
    table, sources = mined(config, source, work)
    groups = {d.key: d.groups[0] for d in table_of(grouped).documents}
    nearest, _ = candidates.load(Workspace(work / "loop").candidates(0))

    recipe, tasks = config.recipe, list(heldout.tasks)
    start = start_of(config.model)
    runs = ShortRuns(start, config.source, heldout, store, work / "runs", recipe)
    found: dict[str, list[Any]] = {name: [] for name in sources}
    # Seed by seed: what is there after an hour is a whole comparison.
    for seed in recipe.seeds:
        for name, own in sources.items():
            count = 0 if name == NONE else recipe.negatives
            ranks = runs.ranks(name, own, count=count, seed=seed)
            if ranks is None:
                print("stopped; the same command goes on", file=sys.stderr)
                return 1
            found[name].append(ranks)
    steps = list(zip(arms.IN_ORDER, arms.IN_ORDER[1:], strict=False))
    made = {
        **environment.describe("benchmarks.arms"),
        "noisy": False,  # nothing here is a time to go by
        "models": Round(work / "loop/rounds/round-00000").manifest["models"],
        "queries": len(table.queries),
        "documents": len(table.documents),
        "percent_of_positive": config.percent_of_positive,
        "recipe": asdict(recipe),
        "asked": {name: len(task.queries) for name, task in heldout.tasks.items()},
        "start": summary([runs.ranks_before()], tasks),
        "arms": {
            name: {
                **summary(found[name], tasks),
                **about(sources[name], table, groups, nearest),
                "seconds": [runs.seconds(name, seed) for seed in recipe.seeds],
            }
            for name in sources
        },
        "differences": {
            f"{b} over {a}": {m: difference(found[a], found[b], m) for m in ("hit@1", "mrr")}
            for a, b in [*steps, (NONE, RERANKER), ("embedder", RERANKER)]
        },
        "seconds_of_this_call": round(time.monotonic() - begun),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    for name, figures in made["arms"].items():
        print(name, {m: figures[m]["mean"] for m in ("hit@1", "mrr")}, f"{figures['false']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
