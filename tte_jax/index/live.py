"""An index that answers while it changes.

Life of a write: the writer lock is taken, the row goes to the delta (or a row is marked dead), and
a new `View` replaces the old one in a single assignment; the next search sees it. Life of a
search: it reads the view once and never looks at anything else, so it needs no lock and cannot see
half a batch. Life of a rebuild: the live rows are copied, a searcher is built and checked beside
serving, writes that arrive meanwhile are remembered and replayed, and one assignment swaps it in.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tte_jax.corpus.records import Change, Removed
from tte_jax.errors import PreconditionError
from tte_jax.filters import Filter
from tte_jax.index import exact, scann_searcher
from tte_jax.index.columns import Columns
from tte_jax.index.crew import Crew
from tte_jax.index.generation import Delta, Generation, Rows, View
from tte_jax.index.protocol import Searcher
from tte_jax.index.recall import (
    QueryRecall,
    QuerySample,
    check_recall,
    worst_true_scores,
)
from tte_jax.index.reports import Found, RebuildReport
from tte_jax.index.view_search import ViewSearch

log = logging.getLogger(__name__)

# A recall target is not raised beyond this: the last per cent costs more than it is worth.
_HIGHEST_TARGET = 0.99


@dataclass(frozen=True)
class IndexConfig:
    """When to approximate and when to rebuild.

    Attributes:
      exact_below: fewer rows than this are searched exactly.
      tree_from: from this many rows on, ScaNN partitions before it hashes.
      delta_rows: rebuild when more rows than this wait in the delta …
      delta_share: … and more than this share of the generation, or when that share is dead.
      recall_floor: least recall for a searcher to serve, on canaries (10 and 50 neighbours) before
        it does, on real queries (their own k and filter) while it does.
      canaries: size of that sample. A recall of 0.95 on 256 has a standard error of at most 0.014,
        on 64 of 0.027.
      checked_queries: size of each sample of real queries.
      recent_queries: real queries that are remembered.
      check_every: queries after which the recall of some of them is measured.
      build_threads: threads that train ScaNN.
      search_threads: threads that share a batch of queries.
    """

    exact_below: int = 5000
    tree_from: int = 20_000
    delta_rows: int = 2048
    delta_share: float = 0.1
    recall_floor: float = 0.95
    canaries: int = 256
    checked_queries: int = 64
    recent_queries: int = 512
    check_every: int = 1000
    build_threads: int = 1
    search_threads: int = os.cpu_count() or 1


class LiveIndex:
    """Search, write and rebuild over one corpus's vectors; see the module's docstring.

    Any number of threads may call any method.
    """

    def __init__(
        self,
        rows: Rows | None = None,
        *,
        sequence: int = 0,
        config: IndexConfig | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.config = config or IndexConfig()
        self._write_lock = threading.Lock()
        self._rebuild_lock = threading.Lock()
        self._crew = Crew(self.config.search_threads)
        # Writes since a running rebuild copied its rows; None when no rebuild runs.
        self._since_copy: list[Change] | None = None
        self.queries = QuerySample(self.config.recent_queries, self.config.check_every)
        # What made the vectors, "" while there are none; kept here by the corpus's owner, so that
        # whoever holds this object cannot search it with another embedder's query.
        self.embedder_version = ""
        self._query_recall = QueryRecall(1.0, 0)
        self._target = self.config.recall_floor
        self._drifted = False
        if generation is None:
            rows = rows if rows is not None else Rows.empty()
            generation = Generation(1, rows, None, Columns(rows.metadata))
        self._view = self._first_view(generation, sequence)

    @property
    def view(self) -> View:
        """The present state, immutable."""
        return self._view

    @property
    def rebuilding(self) -> bool:
        return self._since_copy is not None

    @property
    def query_recall(self) -> QueryRecall:
        """The last measurement on real queries for this generation; of 0 queries before one."""
        return self._query_recall

    def apply(self, changes: Sequence[Change]) -> None:
        """Make a batch of committed writes visible, all at once, to the next search."""
        with self._write_lock:
            self._view = self._after(self._view, changes)
            if self._since_copy is not None:
                self._since_copy.extend(changes)

    def search(self, vector: np.ndarray, k: int, filter: Filter | None = None) -> list[Found]:
        """`search_batch` of one [D] vector."""
        return self.search_batch(np.asarray(vector)[None], k, filter)[0]

    def search_batch(
        self, queries: np.ndarray, k: int, filter: Filter | None = None
    ) -> list[list[Found]]:
        """For each query the k live documents of highest cosine, ties by id; all see one view.

        Args:
          queries: [Q, D] float32, L2-normalised.
          k: at least 1.
          filter: condition on metadata.

        Raises:
          PreconditionError: the corpus has vectors of another dimension.
        """
        view = self._view
        if not view.live or not len(queries):
            return [[] for _ in queries]
        check_dimension(queries, view.dimension)
        self.queries.note(queries, k, filter)
        return ViewSearch(view, k, filter).answer(queries, self._crew)

    def needs_recall_check(self) -> bool:
        """Whether many queries have been answered approximately since the last measurement."""
        return self._view.generation.searcher is not None and self.queries.due

    def measure_recall(self) -> QueryRecall:
        """Answer some of the last queries again, exactly, and compare.

        Below the floor the generation counts as drifted: the next one is built against these
        queries and with half as many misses allowed.
        """
        view = self._view
        vectors = view.generation.rows.vectors
        hits = wanted = 0
        sample = self.queries.draw(self.config.checked_queries, vectors.shape[1])
        for asked in sample:
            search = ViewSearch(view, asked.k, asked.filter)
            rows = search.survivors
            if not len(rows):
                continue
            query = asked.vector[None]
            (worst,) = worst_true_scores(vectors, query, [asked.k], rows)
            of, found = search.candidates(query)
            k = min(asked.k, len(rows))
            hits += min(k, int((exact.score(vectors, query, of, found) >= worst).sum()))
            wanted += k
        recall = QueryRecall(hits / wanted if wanted else 1.0, len(sample) if wanted else 0)
        if view.generation is self._view.generation:
            self._query_recall = recall
            if recall.recall < self.config.recall_floor and self._target < _HIGHEST_TARGET:
                log.warning(
                    "recall on %d real queries is %.3f, below %.3f: the index will be rebuilt",
                    recall.queries, recall.recall, self.config.recall_floor,
                )  # fmt: skip
                self._drifted = True
        return recall

    def needs_rebuild(self) -> bool:
        """Whether the delta or the dead rows have outgrown the limits, ScaNN is due, or the
        recall on real queries has fallen."""
        view, config = self._view, self.config
        built = len(view.alive)
        waiting = len(view.delta_alive)
        dead = built - view.alive_count
        limit = max(config.delta_rows, config.delta_share * built)
        due = view.generation.number == 1 and built >= config.exact_below
        return due or self._drifted or waiting > limit or dead > limit

    def rebuild(self) -> RebuildReport:
        """Build, check and swap in a new generation while searches and writes go on.

        A searcher that cannot reach the recall floor is dropped: the new generation is then
        searched exactly. On failure the old generation keeps serving.

        Raises:
          PreconditionError: a rebuild is running already (`REBUILD_RUNNING`).
        """
        if not self._rebuild_lock.acquire(blocking=False):
            raise PreconditionError(
                "a rebuild of the index is running; wait until it has finished",
                reason="REBUILD_RUNNING",
            )
        try:
            return self._rebuild()
        finally:
            self._rebuild_lock.release()

    def _rebuild(self) -> RebuildReport:
        started = time.monotonic()
        with self._write_lock:
            source = self._view
            self._since_copy = []
            if self._drifted:
                self._target = min(_HIGHEST_TARGET, 1 - (1 - self._target) / 2)
        try:
            rows = source.gather()
            searcher, recall = self._build(rows)
            columns = Columns(rows.metadata)
            number = source.generation.number + 1
            with self._write_lock:
                generation = Generation(number, rows, searcher, columns, recall)
                view = self._first_view(generation, source.sequence)
                # One assignment: a search between two would miss the writes carried over.
                self._view = self._after(view, self._since_copy)
                self._query_recall = QueryRecall(1.0, 0)
                self._drifted = False
        finally:
            with self._write_lock:
                self._since_copy = None
        kind = searcher.kind if searcher else "exact"
        seconds = time.monotonic() - started
        log.info(
            "generation %d: %s over %d rows, canary recall %.3f, %.1f s",
            number, kind, len(rows), recall, seconds,
        )  # fmt: skip
        return RebuildReport(number, kind, len(rows), recall, seconds)

    def _build(self, rows: Rows) -> tuple[Searcher | None, float]:
        config = self.config
        if len(rows) < max(config.exact_below, scann_searcher.MINIMUM_ROWS):
            return None, 1.0
        searcher = scann_searcher.ScannSearcher(
            rows.vectors,
            tree=len(rows) >= config.tree_from,
            threads=config.build_threads,
        )
        asked = self.queries.draw(config.checked_queries, rows.vectors.shape[1])
        recall = check_recall(
            searcher, rows.vectors, config.canaries, self._target, asked, self._crew
        )
        if recall < config.recall_floor:
            log.warning(
                "%s over %d rows reaches canary recall %.3f, below %.3f: searching exactly",
                searcher.kind, len(rows), recall, config.recall_floor,
            )  # fmt: skip
            return None, 1.0
        return searcher, recall

    def _first_view(self, generation: Generation, sequence: int) -> View:
        rows = generation.rows
        delta = Delta(rows.vectors.shape[1])
        # id → generation row, or ~delta row; only the writer reads it.
        self._where = {id: row for row, id in enumerate(rows.ids)}
        return View(
            generation=generation,
            alive=np.ones(len(rows), dtype=bool),
            delta=delta,
            delta_vectors=delta.vectors,
            delta_alive=np.zeros(0, dtype=bool),
            sequence=sequence,
            alive_count=len(rows),
            live=len(rows),
        )

    def _after(self, view: View, changes: Sequence[Change]) -> View:
        if not changes:
            return view
        delta = view.delta
        alive = view.alive.copy()
        alive_count = view.alive_count
        filled = len(view.delta_alive)
        delta_alive = np.concatenate([view.delta_alive, np.zeros(len(changes), dtype=bool)])
        for change in changes:
            row = self._where.pop(change.id, None)
            if row is not None and row >= 0:
                alive[row] = False
                alive_count -= 1
            elif row is not None:
                delta_alive[~row] = False
            if isinstance(change, Removed):
                continue
            if delta.vectors.shape[1] != len(change.vector):
                # Only an empty corpus may change its dimension, so every row here is dead.
                delta = Delta(len(change.vector))
                delta_alive[:] = False
            new = delta.append(change.id, change.vector, change.metadata, change.sequence)
            delta_alive[new] = True
            filled = new + 1
            self._where[change.id] = ~new
        return replace(
            view,
            alive=alive,
            alive_count=alive_count,
            delta=delta,
            delta_vectors=delta.vectors,
            delta_alive=delta_alive[:filled],
            sequence=max(view.sequence, changes[-1].sequence),
            live=len(self._where),
        )


def check_dimension(queries: np.ndarray, dimension: int) -> None:
    """Raise `PreconditionError` unless `queries` [Q, D] have the corpus's dimension."""
    if queries.shape[1] != dimension:
        raise PreconditionError(
            f"the query vector has dimension {queries.shape[1]}; this corpus holds dimension "
            f"{dimension}. Embed the query with the corpus's embedder.",
            reason="DIMENSION_MISMATCH",
            expected=dimension,
            actual=queries.shape[1],
        )
