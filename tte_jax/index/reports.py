"""What an index says of itself, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tte_jax.content import Document, Metadata
from tte_jax.stages import StoredVersions


class Found(NamedTuple):
    """A neighbour: id, cosine (float32 precision), metadata of the row that matched."""

    id: str
    cosine: float
    metadata: Metadata


@dataclass(frozen=True)
class IndexState:
    """State of an index over a corpus's vectors.

    Attributes:
      documents: live documents.
      sequence: number of the last write that it contains.
      searcher: "exact", "scann-ah", "scann-tree-ah" or "milvus-" with the index type.
      generation: counts rebuilds, from 1.
      delta_rows: live rows written since the generation was built (searched exactly).
      dead_rows: rows deleted or replaced that a rebuild will drop.
      rebuilding: whether a rebuild runs.
      canary_recall: recall@10 or @50, the lower, of the serving searcher on its canary sample; 1
        for exact search, 0 = not measured yet (a new Milvus collection).
      query_recall: recall of the serving searcher on real queries, with their k and filters; 1 for
        exact search. Milvus's is not measured: 0, unless it is exact.
      checked_queries: how many real queries that was measured on; 0 = not measured yet.
      snapshot_sequence: sequence of the newest snapshot, 0 = none.
      bytes: bytes of files that are the index's own.
    """

    documents: int
    sequence: int
    searcher: str
    generation: int
    delta_rows: int
    dead_rows: int
    rebuilding: bool
    canary_recall: float
    query_recall: float
    checked_queries: int
    snapshot_sequence: int
    bytes: int


@dataclass(frozen=True)
class IndexStats(IndexState):
    """State of a corpus and its index.

    Attributes:
      dimension: D of the vectors, 0 while empty.
      embedder_version: what made the vectors, "" while empty.
      database_bytes: bytes of the database, its log and the index's own files.
      media_bytes: bytes of the documents' media.
      staged_embedder_version: the next embedder, while a corpus is re-embedded; "" = it is not.
      staged_documents: documents that have a vector of it.
      last_error: why the last rebuild or snapshot in the background failed; "" = it did not.
    """

    dimension: int
    embedder_version: str
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


@dataclass(frozen=True)
class RebuildReport:
    """How a rebuild went: the generation it made, its searcher, its canary recall, its time."""

    generation: int
    kind: str
    rows: int
    recall: float
    seconds: float
