"""ECRs of a whole source by a reasoner in this process, in a file that a later run goes on with.

`training.reason` does the same through a service, for any source; this is for commands that load
the built-in models anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from training.data.ecrs import PLAIN, Ecr, EcrStore, WithEcrs, ecr_key
from training.data.examples import Document
from training.data.rows import ExampleSource
from tte_jax.builtin import models
from tte_jax.content import Side
from tte_jax.engine.served_model import fingerprint
from tte_jax.preprocess.prompts import prompts_name
from tte_jax.reasoner import Reasoner
from tte_jax.stages import ReasonItem

BATCH = 64


def weights_of(model: str) -> str:
    """12 hex digits that are others when the model's weights are; nothing is loaded for it."""
    directory = models.resolve(model)
    return fingerprint(directory, prompts_name(directory))


def write_ecrs(
    wanted: Iterable[tuple[Document, Side]], folder: Path, *, model: str, budget: int
) -> EcrStore:
    """Writes what is missing, batch by batch, and opens the file of this model and budget.

    Args:
      folder: of such files; any number of sources may share it, since ECRs go by content.
      model: a built-in name or a model directory.
      budget: new tokens of each.
    """
    path = folder / f"{weights_of(model)}-{budget}.jsonl"
    with Reasoner.from_pretrained(models.resolve(model)) as reasoner:
        store = EcrStore(path, arm=PLAIN, model=reasoner.version, budget=budget)
        left: dict[str, tuple[Document, Side]] = {}
        for one, side in wanted:
            key = ecr_key(one, side)
            if key not in store:
                left.setdefault(key, (one, side))
        items = list(left.items())
        for start in range(0, len(items), BATCH):
            some = items[start : start + BATCH]
            said = reasoner.reason(
                [ReasonItem(one.content, side, one.instruction) for _, (one, side) in some],
                max_tokens=budget,
            )
            store.append(
                Ecr(key, side, PLAIN, one.key, told.text, reasoner.version, budget)
                for (key, (one, side)), told in zip(some, said, strict=True)
            )
            print(f"{start + len(some)} of {len(items)} ECRs", file=sys.stderr, flush=True)
    return store


def with_ecrs(source: ExampleSource, folder: Path, *, model: str, budget: int) -> WithEcrs:
    """The source with the ECR of every query and document."""

    def wanted() -> Iterable[tuple[Document, Side]]:
        for index in range(len(source)):
            example = source[index]
            yield example.query, Side.QUERY
            for one in (*example.positives, *example.negatives):
                yield one, Side.DOCUMENT

    return WithEcrs(source, write_ecrs(wanted(), folder, model=model, budget=budget))
