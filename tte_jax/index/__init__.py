"""Nearest-neighbour search that follows a durable corpus write by write."""

from tte_jax.index.live import IndexConfig, LiveIndex, RebuildReport
from tte_jax.index.local_index import LocalIndex
from tte_jax.index.protocol import Searcher
from tte_jax.index.reports import IndexStats
from tte_jax.index.service_index import CorpusIndex

__all__ = [
    "CorpusIndex",
    "IndexConfig",
    "IndexStats",
    "LiveIndex",
    "LocalIndex",
    "RebuildReport",
    "Searcher",
]
