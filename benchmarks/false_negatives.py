"""How many false negatives the reranker's filter keeps out of mined negatives, and what that is
worth.

    python -m benchmarks.false_negatives --data .data/emoji

Queries for drawings (training split only) are mined with the built-in models, a tenth of the
documents standing twice under new keys. The duplicates are the same drawings ("renamed"), or the
same drawings turned and sheared a little ("redrawn"), which the reasoner words anew and may word
otherwise. Mining is not told which drawings show the same concept either, so that other artists'
drawings of the wanted thing, which are right answers too, are counted beside them. Then the
embedder is trained on for a few steps with the negatives that the filter left, and with those
chosen without it, and asked held-out queries. Every finished piece is kept; an interrupted run goes
on.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from benchmarks import environment
from benchmarks.short_runs import Recipe, ShortRuns, difference, start_of, summary
from training import loop
from training.builtin.heldout import HeldOut
from training.builtin.images import turned
from training.builtin.reasonings import weights_of, with_ecrs, write_ecrs
from training.data import emoji
from training.data.emoji_examples import png
from training.data.examples import Document
from training.data.rows import ExampleSource, document
from training.data.sources import open_source
from training.launch import without_avx512
from training.mining import candidates, injection
from training.mining.mined_source import MinedSource
from training.mining.records import RERANKER, UNFILTERED, Rules
from training.mining.rounds import Round, sealed
from training.mining.table import Table, table_of
from training.mining.ungrouped import Ungrouped
from training.mining.workspace import Workspace
from tte_jax.builtin import models
from tte_jax.content import Content
from tte_jax.engine.executables import enable_compile_cache

# Scored negatives kept of each query, so that stricter filters can be told from the same round.
KEPT = 64


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `training.data.emoji`.
      work: vectors, the round and every run's ranks, in a folder for each state of the weights.
      ecrs: reasonings by content; `benchmarks.arms` reads the same ones.
      text, composed: queries of each kind; a query brings its right drawing.
      copies: what a duplicate is.
      share: of the documents that stand twice.
      percent_of_positive: t of the filter that is trained with; percents: others to count by.
      negatives: of a query, for the counts.
      budget: reasoning tokens.
      asked: held-out queries of each task; pool: pictures that they choose among beside the right
        ones of all queries, 0 = all of the style.
      quality: train with and without the filter as well.
      reranker: address of a running one; "" = one is started.
    """

    data: Path = Path(".data/emoji")
    work: Path = Path(".data/runs/false_negatives")
    ecrs: Path = Path(".data/runs/emoji-ecrs")
    out: Path = Path("benchmarks/results/false_negatives.json")
    text: int = 2000
    composed: int = 2000
    copies: Literal["renamed", "redrawn"] = "redrawn"
    share: float = 0.1
    percent_of_positive: float = 1.0
    percents: tuple[float, ...] = (0.95, 0.9, 0.75, 0.5)
    negatives: int = 7
    budget: int = 64
    asked: int = 400
    pool: int = 0
    seed: int = 0
    quality: bool = True
    reranker: str = ""
    model: str = models.EMBEDDER
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def source(self) -> str:
        return f"emoji:{self.data}?text={self.text}&composed={self.composed}&seed={self.seed}"


def redrawn(seed: int) -> Any:
    """Turns and shears a drawing: another file, another reasoning, the same thing."""

    def copy(one: Document) -> Document:
        rng = np.random.default_rng((seed, int(one.key[:8], 16)))
        picture = np.asarray(_decoded(one.content.media[0].data))
        made = turned(picture, rng)
        while np.array_equal(made, picture):  # `turned` leaves some as they are
            made = turned(picture, rng)
        return document(Content.of(one.content.text, png(made)), instruction=one.instruction)

    return copy


def _decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def mined(config: Config, source: ExampleSource, state: Path) -> tuple[Table, np.ndarray, Round]:
    """(table, candidates, the reranker's round) of the source with duplicates."""
    rules = Rules(
        arm=RERANKER,
        negatives=KEPT,
        percent_of_positive=config.percent_of_positive,
        seed=config.seed,
    )
    setting = loop.Config(
        data=config.source,
        state=state,
        model=config.model,
        reranker=config.reranker,
        rules=rules,
    )
    space = Workspace(setting.state)
    with space.locked():
        space.claim(
            {
                "data": config.source,
                "copies": config.copies,
                "share": config.share,
                "budget": config.budget,
                "model": config.model,
                "rules": asdict(rules),
            }
        )
        table = space.table(source)
        if not sealed(space.rounds):
            opened = loop.embedder_opener(setting)
            asyncio.run(loop.mine_round(setting, space, source, table, 0, opened))
    return table, candidates.load(space.candidates(0))[0], Round(space.round(0))


def quality(
    config: Config, source: ExampleSource, table: Table, round: Round, state: Path
) -> dict[str, Any] | None:
    """Held-out figures of the embedder trained on with and without the filter; None = stopped."""
    data = emoji.load(config.data)
    heldout = HeldOut(data, queries=config.asked, pool=config.pool, seed=config.seed)
    store = write_ecrs(
        heldout.wanted(),
        config.ecrs,
        model=config.model,
        budget=config.budget,
    )
    recipe, tasks, start = config.recipe, list(heldout.tasks), start_of(config.model)
    runs = ShortRuns(start, config.source, heldout, store, state / "runs", recipe)
    count = recipe.negatives
    own = {
        UNFILTERED: MinedSource(source, round, table, negatives=count, filtered=False),
        RERANKER: MinedSource(source, round, table, negatives=count),
    }
    found: dict[str, list[Any]] = {name: [] for name in own}
    for seed in recipe.seeds:
        for name, one in own.items():
            ranks = runs.ranks(name, one, count=count, seed=seed)
            if ranks is None:
                return None
            found[name].append(ranks)
    return {
        "recipe": asdict(recipe),
        "start": summary([runs.ranks_before()], tasks),
        "arms": {name: summary(found[name], tasks) for name in own},
        "difference": {
            m: difference(found[UNFILTERED], found[RERANKER], m) for m in ("hit@1", "mrr")
        },
    }


def main(config: Config) -> int:
    """Mines one round, writes what its filter did, and what that was worth."""
    without_avx512(os.environ)
    enable_compile_cache(config.work / "compile-cache")
    base = open_source(config.source)
    grouped = table_of(base)
    groups = {d.key: d.groups[0] for d in grouped.documents}
    copy = injection.renamed if config.copies == "renamed" else redrawn(config.seed)
    injected = injection.WithDuplicates(
        Ungrouped(base), grouped, copy=copy, share=config.share, seed=config.seed
    )
    source = with_ecrs(injected, config.ecrs, model=config.model, budget=config.budget)
    state = (
        config.work / f"{weights_of(config.model)}-{config.copies}-{config.percent_of_positive:g}"
    )
    table, found, round = mined(config, source, state)
    figures = injection.count(
        table,
        found,
        round,
        injected.originals,
        groups,
        negatives=config.negatives,
        percents=config.percents,
    )
    made = {
        **environment.describe("benchmarks.false_negatives"),
        "noisy": False,  # nothing here is a time
        "models": round.manifest["models"],
        "rules": round.manifest["rules"],
        "copies": config.copies,
        "share": config.share,
        "negatives": config.negatives,
        **figures,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        config.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")

    write()
    print(json.dumps(figures, indent=1), flush=True)
    if config.quality:
        worth = quality(config, source, table, round, state)
        if worth is None:
            print("stopped; the same command goes on", file=sys.stderr)
            return 1
        made["quality"] = worth
        write()
        print(json.dumps(worth, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
