"""How many false negatives the reranker's filter keeps out of mined negatives.

    python -m benchmarks.false_negatives --data .data/emoji

Queries for drawings (training split only) are mined with the built-in models, a tenth of the
documents standing twice under new keys. The duplicates are the same drawings ("renamed"), or the
same drawings turned and sheared a little ("redrawn"), which the reasoner words anew and may word
otherwise. Mining is not told which drawings show the same concept either, so that other artists'
drawings of the wanted thing, which are right answers too, are counted beside them.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from benchmarks import environment
from training import loop
from training.builtin.images import turned
from training.data import emoji
from training.data.ecrs import PLAIN, Ecr, EcrStore, WithEcrs, ecr_key
from training.data.emoji_examples import EmojiSource, png
from training.data.examples import Document, Example
from training.data.mixture import Mixture, Weighted
from training.data.rows import ExampleSource, document
from training.mining import candidates, injection
from training.mining.records import RERANKER, Rules
from training.mining.rounds import Round, sealed
from training.mining.table import table_of
from training.mining.workspace import Workspace
from tte_jax.builtin import models
from tte_jax.content import Content, Side
from tte_jax.engine.executables import enable_compile_cache
from tte_jax.reasoner import Reasoner
from tte_jax.stages import ReasonItem

BATCH = 64


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `training.data.emoji`.
      work: ECRs, vectors and rounds; a run that was cut short goes on there.
      text, composed: queries of each kind; a query brings its right drawing.
      copies: what a duplicate is.
      share: of the documents that stand twice.
      percent_of_positive: t of the filter, and others to report from the same scores.
      budget: reasoning tokens.
    """

    data: Path = Path(".data/emoji")
    work: Path = Path(".data/runs/false_negatives")
    out: Path = Path("benchmarks/results/false_negatives.json")
    text: int = 1000
    composed: int = 1000
    copies: Literal["renamed", "redrawn"] = "redrawn"
    share: float = 0.1
    percent_of_positive: float = 1.0
    negatives: int = 7
    budget: int = 64
    seed: int = 0
    reranker: str = ""
    model: str = models.EMBEDDER


class Ungrouped:
    """A source without its groups: what mining must find out by itself."""

    def __init__(self, source: ExampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return replace(self.source[index], group="")


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


def told(source: ExampleSource, config: Config) -> WithEcrs:
    """The source with the built-in reasoner's ECRs, written to a file and read from there."""
    path = config.work / f"ecrs-{config.copies}.jsonl"
    with Reasoner.from_pretrained(models.resolve(config.model)) as reasoner:
        store = EcrStore(path, arm=PLAIN, model=reasoner.version, budget=config.budget)
        wanted: dict[str, tuple[Document, Side]] = {}
        for index in range(len(source)):
            example = source[index]
            documents = [(d, Side.DOCUMENT) for d in (*example.positives, *example.negatives)]
            for one, side in [(example.query, Side.QUERY), *documents]:
                wanted.setdefault(ecr_key(one, side), (one, side))
        left = [(key, *value) for key, value in wanted.items() if key not in store]
        for start in range(0, len(left), BATCH):
            some = left[start : start + BATCH]
            items = [ReasonItem(one.content, side) for _, one, side in some]
            said = reasoner.reason(items, max_tokens=config.budget)
            store.append(
                Ecr(key, side, PLAIN, one.key, r.text, reasoner.version, config.budget)
                for (key, one, side), r in zip(some, said, strict=True)
            )
            print(f"{start + len(some)} of {len(left)} ECRs", file=sys.stderr, flush=True)
    return WithEcrs(source, store)


def main(config: Config) -> int:
    """Mines one round and writes what its filter did."""
    enable_compile_cache(config.work / "compile-cache")
    data = emoji.load(config.data)
    kinds = {"text": config.text, "composed": config.composed}
    base = Mixture(
        [
            Weighted(f"emoji-{k}", EmojiSource(data, k, n, seed=config.seed), float(n))
            for k, n in kinds.items()
            if n
        ]
    )
    grouped = table_of(base)
    groups = {d.key: d.groups[0] for d in grouped.documents}
    copy = injection.renamed if config.copies == "renamed" else redrawn(config.seed)
    injected = injection.WithDuplicates(
        Ungrouped(base), grouped, copy=copy, share=config.share, seed=config.seed
    )
    source = told(injected, config)

    rules = Rules(
        arm=RERANKER,
        negatives=config.negatives,
        percent_of_positive=config.percent_of_positive,
        seed=config.seed,
    )
    setting = loop.Config(
        data=f"emoji:{config.data}",
        state=config.work / f"{config.copies}-{config.percent_of_positive:g}",
        model=config.model,
        reranker=config.reranker,
        rules=rules,
    )
    space = Workspace(setting.state)
    with space.locked():
        space.claim({**{k: str(v) for k, v in vars(config).items()}, "out": ""})
        table = space.table(source)
        if not sealed(space.rounds):
            opened = loop.embedder_opener(setting)
            asyncio.run(loop.mine_round(setting, space, source, table, 0, opened))
    found, _ = candidates.load(space.candidates(0))
    round = Round(space.round(0))
    figures = injection.count(table, found, round, injected.originals, groups)
    made = {
        **environment.describe("benchmarks.false_negatives"),
        "models": round.manifest["models"],
        "rules": round.manifest["rules"],
        "copies": config.copies,
        **figures,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
