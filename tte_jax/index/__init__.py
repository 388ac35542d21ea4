"""Nearest-neighbour search that follows a durable corpus write by write."""

from tte_jax.index.corpus_index import CorpusIndex
from tte_jax.index.live import IndexConfig, LiveIndex
from tte_jax.index.local_index import LocalIndex
from tte_jax.index.protocol import Searcher, VectorIndex
from tte_jax.index.reports import IndexStats, RebuildReport

__all__ = [
    "CorpusIndex",
    "IndexConfig",
    "IndexStats",
    "LiveIndex",
    "LocalIndex",
    "RebuildReport",
    "Searcher",
    "VectorIndex",
]
