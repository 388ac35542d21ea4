"""From disk to the first generation: newest valid snapshot, replay, reconciliation."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from tte_jax.content import Metadata
from tte_jax.corpus.records import Removed, Stored
from tte_jax.corpus.store import CorpusStore
from tte_jax.index import snapshots
from tte_jax.index.generation import Rows

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"


def recover(store: CorpusStore, snapshot_root: Path) -> tuple[Rows, int]:
    """The rows that the database says are live, and the snapshot's sequence (0 = none used).

    The result is reconciled with the database's own list of (id, sequence), so that a snapshot can
    make the start faster but can never add, lose or revive a document.
    """
    metadata = store.metadata()
    found = snapshots.load_newest(
        snapshot_root,
        corpus_id=store.corpus_id,
        horizon=store.horizon,
        sequence=store.sequence,
        known=store.snapshot_digests(),
    )
    if found is not None:
        sequence, base = found
        rows = _replay(store, base, sequence, metadata)
        if _agrees(rows, metadata):
            return rows, sequence
        log.warning("snapshot %d contradicts the database; reading all vectors from it", sequence)
    return _replay(store, Rows.empty(), 0, metadata), 0


def _replay(
    store: CorpusStore, base: Rows, sequence: int, metadata: dict[str, tuple[int, Metadata]]
) -> Rows:
    alive = dict.fromkeys(base.ids, True)
    fresh: dict[str, Stored] = {}
    for change in store.changes_since(sequence):
        alive.pop(change.id, None)
        fresh.pop(change.id, None)
        if not isinstance(change, Removed):
            fresh[change.id] = change
    if len(alive) < len(base):
        kept = [i for i, id in enumerate(base.ids) if id in alive]
        ids = [base.ids[i] for i in kept]
        base = Rows(ids, base.vectors[kept], base.sequences[kept], [])
    ids, vectors, sequences = base.ids + list(fresh), base.vectors, base.sequences
    if not ids:
        return Rows.empty()
    if fresh:
        vectors = np.stack([change.vector for change in fresh.values()])
        if len(base):
            if vectors.shape[1] != base.vectors.shape[1]:
                # Cannot come from one corpus; `_agrees` refuses it.
                return Rows.empty()
            vectors = np.concatenate([base.vectors, vectors])
        numbers = np.array([change.sequence for change in fresh.values()], np.int64)
        sequences = np.concatenate([sequences, numbers])
    nothing = (0, {})
    return Rows(ids, vectors, sequences, [metadata.get(id, nothing)[1] for id in ids])


def _agrees(rows: Rows, metadata: dict[str, tuple[int, Metadata]]) -> bool:
    if len(rows) != len(metadata):
        return False
    nothing = (0, {})
    return [metadata.get(id, nothing)[0] for id in rows.ids] == rows.sequences.tolist()
