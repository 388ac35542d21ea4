"""The corpus's vectors in this process's memory, searched exactly or by ScaNN."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tte_jax.corpus.records import Change
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import PreconditionError
from tte_jax.filters import Filter
from tte_jax.index import consistency, reembedding, snapshots
from tte_jax.index.generation import Generation
from tte_jax.index.live import IndexConfig, LiveIndex
from tte_jax.index.maintenance import Job
from tte_jax.index.recovery import SNAPSHOTS, recover
from tte_jax.index.reports import Found, IndexState, RebuildReport, SnapshotReport

log = logging.getLogger(__name__)


class ScannIndex:
    """A `VectorIndex`: the live index with its snapshots, rebuilds and checks.

    Args:
      store: the corpus's database.
      config: thresholds of the index.
      snapshot_every: writes between automatic snapshots.

    Raises:
      DataLossError: the database's vectors cannot be read.
    """

    def __init__(
        self,
        store: CorpusStore,
        *,
        config: IndexConfig | None = None,
        snapshot_every: int = 10_000,
    ) -> None:
        self._store = store
        self._snapshots = store.path / SNAPSHOTS
        self._snapshot_every = snapshot_every
        self._snapshot_lock = threading.Lock()
        rows, self._snapshot_sequence = recover(store, self._snapshots)
        # Replaced whole by `exchange`; whoever takes it works on with what it took.
        self.live = LiveIndex(rows, sequence=store.sequence, config=config)

    @property
    def embedder_version(self) -> str:
        return self.live.embedder_version

    @embedder_version.setter
    def embedder_version(self, version: str) -> None:
        self.live.embedder_version = version

    @property
    def documents(self) -> int:
        return self.live.view.live

    @property
    def sequence(self) -> int:
        return self.live.view.sequence

    def apply(self, changes: Sequence[Change]) -> None:
        self.live.apply(changes)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        filter: Filter | None = None,
        *,
        embedder_version: str = "",
    ) -> list[list[Found]]:
        """See `VectorIndex.search`."""
        live = self.live
        check_embedder(live.embedder_version, embedder_version)
        return live.search_batch(queries, k, filter)

    def state(self) -> IndexState:
        view, measured = self.live.view, self.live.query_recall
        generation = view.generation
        return IndexState(
            documents=view.live,
            sequence=view.sequence,
            searcher=generation.searcher.kind if generation.searcher else "exact",
            generation=generation.number,
            delta_rows=int(view.delta_alive.sum()),
            dead_rows=len(view.alive) + len(view.delta_alive) - view.live,
            rebuilding=self.live.rebuilding,
            canary_recall=generation.recall,
            query_recall=measured.recall,
            checked_queries=measured.queries,
            snapshot_sequence=self._snapshot_sequence,
            bytes=sum(snapshots.size(path) for path in snapshots.listed(self._snapshots)),
        )

    def rebuild(self) -> RebuildReport:
        """Build a new generation beside serving, check its recall, swap it in.

        Raises: as `LiveIndex.rebuild`.
        """
        return self.live.rebuild()

    def snapshot(self) -> SnapshotReport:
        """Write a snapshot beside serving.

        Raises:
          StorageFullError: no space; the older snapshots still stand.
        """
        with self._snapshot_lock:
            view = self.live.view
            known = self._store.snapshot_digests()
            path = snapshots.write(
                self._snapshots,
                view.gather(),
                corpus_id=self._store.corpus_id,
                sequence=view.sequence,
                known=known,
            )
            self._snapshot_sequence = view.sequence
            known[view.sequence] = snapshots.digest(path)
            there = {int(p.name) for p in snapshots.listed(self._snapshots)}
            kept = {number: digest for number, digest in known.items() if number in there}
            self._store.record_snapshots(kept)
            # Replay from the oldest snapshot kept must stay possible.
            self._store.forget_tombstones(min(kept))
            return SnapshotReport(view.sequence, snapshots.size(path))

    def prepare(self) -> Generation:
        """The staged vectors as a generation."""
        return reembedding.build(self._store, config=self.live.config)

    def exchange(
        self, prepared: Generation, promoted: Mapping[str, tuple[int, int]], embedder_version: str
    ) -> None:
        """See `VectorIndex.exchange`."""
        config = self.live.config
        try:
            green = replace(prepared, number=self.live.view.generation.number + 1)
            live = reembedding.exchange(self._store, green, promoted, config)
        except Exception:
            # The database has changed over: serve what it says, however it is made.
            log.exception("the prepared index cannot be used; reading all vectors")
            rows, _ = recover(self._store, self._snapshots)
            live = LiveIndex(rows, sequence=self._store.sequence, config=config)
        live.embedder_version = embedder_version
        self.live = live

    def jobs(self) -> Sequence[Job]:
        return (
            Job("rebuild", self._rebuild_due, self._rebuild_if_free),
            Job("snapshot", self._snapshot_due, self.snapshot),
            Job(
                "recall",
                lambda: self.live.needs_recall_check(),
                lambda: self.live.measure_recall(),
            ),
        )

    @property
    def work_due(self) -> bool:
        return self.live.queries.due

    def differences(self) -> Iterable[str]:
        return consistency.differences(self._store, self.live.view.gather())

    def close(self) -> None:
        """Snapshot if many writes happened since the last one."""
        if self._snapshot_due():
            self.snapshot()

    def _rebuild_due(self) -> bool:
        return self.live.needs_rebuild() and not self.live.rebuilding

    def _rebuild_if_free(self) -> None:
        try:
            self.live.rebuild()
        except PreconditionError as exc:
            if exc.reason != "REBUILD_RUNNING":
                raise

    def _snapshot_due(self) -> bool:
        return self.live.view.sequence - self._snapshot_sequence >= self._snapshot_every


def check_embedder(stored: str, asked: str) -> None:
    """Raise `PreconditionError` when a query's embedder is known and not the corpus's."""
    if asked and stored not in ("", asked):
        raise PreconditionError(
            f"the query was embedded by {asked!r}; this corpus holds vectors of "
            f"{stored!r}, and the two cannot be compared. Embed the query with "
            "the corpus's embedder, or re-embed the corpus (`tte corpus reembed`).",
            reason="EMBEDDER_MISMATCH",
            expected=stored,
            actual=asked,
        )
