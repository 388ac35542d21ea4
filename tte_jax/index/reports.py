"""What an index says of itself, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tte_jax.content import Document
from tte_jax.stages import StoredVersions


@dataclass(frozen=True)
class IndexStats:
    """State of a corpus and its index.

    Attributes:
      documents: live documents.
      sequence: number of the last write.
      dimension: D of the vectors, 0 while empty.
      embedder_version: what made the vectors, "" while empty.
      searcher: "exact", "scann-ah" or "scann-tree-ah".
      generation: counts rebuilds, from 1.
      delta_rows: live rows written since the generation was built (searched exactly).
      dead_rows: rows deleted or replaced that a rebuild will drop.
      rebuilding: whether a rebuild runs.
      canary_recall: recall@10 or @50, the lower, of the serving searcher on its canary sample.
      query_recall: recall of the serving searcher on real queries, with their k and filters; 1 for
        exact search.
      checked_queries: how many real queries that was measured on; 0 = not measured yet.
      snapshot_sequence: sequence of the newest snapshot, 0 = none.
      database_bytes: bytes of the database, its log and the snapshots.
      media_bytes: bytes of the documents' media.
      staged_embedder_version: the next embedder, while a corpus is re-embedded; "" = it is not.
      staged_documents: documents that have a vector of it.
      last_error: why the last rebuild or snapshot in the background failed; "" = it did not.
    """

    documents: int
    sequence: int
    dimension: int
    embedder_version: str
    searcher: str
    generation: int
    delta_rows: int
    dead_rows: int
    rebuilding: bool
    canary_recall: float
    query_recall: float
    checked_queries: int
    snapshot_sequence: int
    database_bytes: int
    media_bytes: int
    staged_embedder_version: str
    staged_documents: int
    last_error: str


class Fetched(NamedTuple):
    """A stored document and what it was made of, from one read."""

    document: Document
    versions: StoredVersions


@dataclass(frozen=True)
class SnapshotReport:
    """A finished snapshot: the last write it contains, and its size."""

    sequence: int
    bytes: int
