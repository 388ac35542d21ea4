"""What a sealed round of `training.loop` says about concepts: which are found for which.

A batch of `builtin.pairs` holds a document of each concept that it asks for, and every query sees
every document. So a query meets the negatives that were mined for it when the concepts that they
show are drawn into its batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.emoji import EmojiData
from training.mining.rounds import Round
from training.mining.table import table_beside
from tte_jax.errors import InvalidInputError


def confused(folder: Path, data: EmojiData, concepts: np.ndarray) -> list[np.ndarray]:
    """For each query with negatives: its concept, then those that its negatives show, the hardest
    first, each once.

    Args:
      folder: a sealed round over `emoji:` data, below the loop's folder.
      concepts: [C] ascending concept ids; results are places in it.

    Raises:
      InvalidInputError: the round is of other data, or nothing was mined.
    """
    table = table_beside(folder)
    place = {data.concepts[c].key: i for i, c in enumerate(concepts)}

    def shown(groups: tuple[str, ...]) -> list[int]:
        keys = (group.removeprefix("emoji:") for group in groups)
        return [place[key] for key in keys if key in place]

    by_key = {(table.datasets[d.dataset], d.key): shown(d.groups) for d in table.documents}
    round, found = Round(folder), []
    rules = round.rules
    for number, query in enumerate(table.queries):
        record = round[number]
        about = shown((query.group,))
        others = [
            c
            for one in record.chosen(filtered=rules.filters, count=rules.negatives)
            for c in by_key[record.dataset, one.key]
            if c not in about
        ]
        if about and others:
            found.append(np.array(list(dict.fromkeys(about + others))))
    if not found:
        raise InvalidInputError(
            f"{folder} has no negatives for concepts of these data; expected a round that was mined"
            " from emoji:DATA by an arm with negatives",
            field="mined",
        )
    return found
