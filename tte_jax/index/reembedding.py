"""The index of the next embedder's vectors, built beside the serving one, then exchanged for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tte_jax.corpus.records import Removed, Stored
from tte_jax.corpus.staging import Staging
from tte_jax.corpus.store import CorpusStore
from tte_jax.index.columns import Columns
from tte_jax.index.generation import Generation, Rows
from tte_jax.index.live import IndexConfig, LiveIndex


def build(store: CorpusStore, *, config: IndexConfig) -> Generation:
    """The staged vectors as a generation; takes long, while the old one serves."""
    metadata = store.metadata()
    staged = [one for one in Staging(store).vectors() if one.id in metadata]
    if not staged:
        return Generation(1, Rows.empty(), None, Columns([]))
    rows = Rows(
        ids=[one.id for one in staged],
        vectors=np.stack([one.vector for one in staged]),
        sequences=np.array([one.sequence for one in staged], np.int64),
        metadata=[metadata[one.id][1] for one in staged],
    )
    live = LiveIndex(rows, config=config)
    live.rebuild()
    return live.view.generation


def exchange(
    store: CorpusStore,
    green: Generation,
    promoted: Mapping[str, tuple[int, int]],
    config: IndexConfig,
) -> LiveIndex:
    """A live index of `green`, brought to what `Staging.promote` has just made the truth.

    Writes must wait meanwhile. What was written since `green` was built comes from the database.
    """
    rows = green.rows
    sequences = np.zeros(len(rows), np.int64)
    gone: list[str] = []
    for i, id in enumerate(rows.ids):
        before, now = promoted.get(id, (0, 0))
        if before == rows.sequences[i]:
            sequences[i] = now
        else:
            gone.append(id)
    same = set(rows.ids).difference(gone)
    fresh = store.entries_of([id for id in promoted if id not in same])
    live = LiveIndex(
        sequence=store.sequence,
        config=config,
        generation=replace(green, rows=replace(rows, sequences=sequences)),
    )
    live.apply([*(Removed(0, id) for id in gone), *sorted(fresh, key=_sequence)])
    return live


def _sequence(change: Stored) -> int:
    return change.sequence
