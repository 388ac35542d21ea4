"""The indices that are compared, behind one small interface; each runs in a process of its own.

Every contender gets the same unit vectors, answers by dot product with exact scores where it can
refine, and is swept over one parameter that trades speed for recall.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_AT_ONCE = 100_000  # rows


class Contender(Protocol):
    """An index under test.

    Attributes:
      saved: whether `save` keeps the built index for the next run.
      values: what `set` takes, by rising recall.
    """

    saved: bool
    values: list[Any]

    def build(self, vectors: np.ndarray, threads: int, done: int) -> int:
        """Take up more rows, beginning with row `done`; returns how many it holds now."""
        ...

    def save(self, path: Path) -> None: ...

    def load(self, path: Path, vectors: np.ndarray) -> None: ...

    def threads(self, count: int) -> None: ...

    def set(self, value: Any) -> None: ...

    def search(self, queries: np.ndarray, k: int) -> Any:
        """What the library itself answers with; only this is timed."""
        ...

    def rows(self, answer: Any, k: int) -> np.ndarray:
        """[Q, k] rows of an answer."""
        ...


class _AnswersRows:
    """A library that answers with an array of rows."""

    def rows(self, answer: np.ndarray, k: int) -> np.ndarray:
        return answer


class _Faiss(_AnswersRows):
    """Anything that FAISS makes from a description."""

    saved = True

    def _make(self, rows: int) -> Any:
        raise NotImplementedError

    def build(self, vectors: np.ndarray, threads: int, done: int) -> int:
        self.threads(threads)
        if not done:
            self.dimension = vectors.shape[1]
            self.index = self._make(len(vectors))
            if not self.index.is_trained:
                self.index.train(np.ascontiguousarray(vectors[:100_000]))
        self.index.add(np.ascontiguousarray(vectors[done : done + _AT_ONCE]))
        return self.index.ntotal

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(path))

    def load(self, path: Path, vectors: np.ndarray) -> None:
        import faiss

        self.index = faiss.read_index(str(path))

    def threads(self, count: int) -> None:
        import faiss

        faiss.omp_set_num_threads(count)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(queries, k)[1]


class FaissFlat(_Faiss):
    values = [None]
    saved = False

    def _make(self, rows: int) -> Any:
        import faiss

        return faiss.IndexFlatIP(self.dimension)

    def set(self, value: None) -> None:
        pass


class FaissIvf(_Faiss):
    values = [1, 2, 4, 8, 16, 32, 64, 128]

    def _make(self, rows: int) -> Any:
        import faiss

        code = f"IVF{_lists(rows)},Flat"
        return faiss.index_factory(self.dimension, code, faiss.METRIC_INNER_PRODUCT)

    def set(self, value: int) -> None:
        self.index.nprobe = value


class FaissIvfPq(FaissIvf):
    """Fast-scan product quantisation in inverted lists, then exact scores of the best."""

    values = [1, 2, 4, 8, 16, 32, 64, 128]

    def _make(self, rows: int) -> Any:
        import faiss

        # Two dimensions a code, as ours.
        code = f"IVF{_lists(rows)},PQ{self.dimension // 2}x4fs,RFlat"
        return faiss.index_factory(self.dimension, code, faiss.METRIC_INNER_PRODUCT)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self.index.k_factor = max(2.0, 100 / k)  # as many exact scores as ours by default
        return super().search(queries, k)

    def set(self, value: int) -> None:
        import faiss

        faiss.downcast_index(self.index.base_index).nprobe = value


class FaissHnsw(_Faiss):
    values = [16, 32, 64, 128, 256, 512]

    def _make(self, rows: int) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(self.dimension, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        return index

    def set(self, value: int) -> None:
        self.index.hnsw.efSearch = value


class Hnswlib(_AnswersRows):
    values = [16, 32, 64, 128, 256, 512]
    saved = True

    def build(self, vectors: np.ndarray, threads: int, done: int) -> int:
        import hnswlib

        if not done:
            self.index = hnswlib.Index("ip", vectors.shape[1])
            self.index.init_index(len(vectors), ef_construction=100, M=16)
        self.index.add_items(vectors[done : done + _AT_ONCE], num_threads=threads)
        self.count = threads
        return self.index.element_count

    def save(self, path: Path) -> None:
        self.index.save_index(str(path))

    def load(self, path: Path, vectors: np.ndarray) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", vectors.shape[1])
        self.index.load_index(str(path), max_elements=len(vectors))

    def threads(self, count: int) -> None:
        self.count = count

    def set(self, value: int) -> None:
        self.ef = value

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self.index.set_ef(max(self.ef, k))
        return self.index.knn_query(queries, k, num_threads=self.count)[0]


class Usearch(_AnswersRows):
    values = [16, 32, 64, 128, 256, 512]
    saved = True

    def _empty(self, dimension: int) -> Any:
        from usearch.index import Index

        return Index(ndim=dimension, metric="ip", dtype="f32", connectivity=16, expansion_add=100)

    def build(self, vectors: np.ndarray, threads: int, done: int) -> int:
        if not done:
            self.index = self._empty(vectors.shape[1])
        part = np.ascontiguousarray(vectors[done : done + _AT_ONCE])
        self.index.add(np.arange(done, done + len(part)), part, threads=threads)
        self.count = threads
        return done + len(part)

    def save(self, path: Path) -> None:
        self.index.save(str(path))

    def load(self, path: Path, vectors: np.ndarray) -> None:
        self.index = self._empty(vectors.shape[1])
        self.index.load(str(path))

    def threads(self, count: int) -> None:
        self.count = count

    def set(self, value: int) -> None:
        self.ef = value

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self.index.expansion_search = max(self.ef, k)
        found = self.index.search(queries, k, threads=self.count)
        return np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)


class Ours:
    """`LiveIndex` in process: what the index service searches, as far as ids and scores.

    Its values are recall targets: each stands for the effort that the index chooses for it, on
    canaries; 0.95 is the default.
    """

    saved = False
    values: list[Any] = [0.75, 0.85, 0.88, 0.9, 0.92, 0.95, 0.98]

    def __init__(self, **config: Any) -> None:
        self._config = config
        # Chosen when they are first asked for: not a part of building.
        self.efforts: dict[float, Any] = {}

    def build(self, vectors: np.ndarray, threads: int, done: int) -> int:
        from tte_jax.index import IndexConfig, LiveIndex
        from tte_jax.index.generation import Rows
        from tte_jax.index.recall import TIE_ROWS

        self._in_excess = TIE_ROWS  # ours asks for so many more than k
        self._width = len(str(len(vectors)))
        ids = [f"{i:0{self._width}d}" for i in range(len(vectors))]
        rows = Rows(ids, np.array(vectors), np.arange(1, len(ids) + 1), [{}] * len(ids))
        config = IndexConfig(
            check_every=2**62, build_threads=threads, search_threads=threads, **self._config
        )
        self.live = LiveIndex(rows, sequence=len(ids), config=config)
        self.report = self.live.rebuild()
        self.searcher: Any = self.live.view.generation.searcher
        if self.searcher is None:
            self.values = [1.0]
        return len(vectors)

    def _effort(self, vectors: np.ndarray, target: float) -> Any:
        from tte_jax.index.recall import check_recall

        self.searcher.effort = self.searcher.efforts[0]
        check_recall(self.searcher, vectors, self.live.config.canaries, target)
        return self.searcher.effort

    def save(self, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path, vectors: np.ndarray) -> None:
        raise NotImplementedError

    def threads(self, count: int) -> None:
        # Ours shares a batch among the threads of its configuration and asks a query alone on its
        # caller's.
        if self.searcher is not None:
            self.searcher.library.set_num_threads(count)
        self.count = count

    def set(self, value: float) -> None:
        if self.searcher is None:
            return
        if value not in self.efforts:
            rows = self.live.view.generation.rows
            self.efforts[value] = self._effort(rows.vectors, value)
        self.searcher.effort = self.efforts[value]

    def search(self, queries: np.ndarray, k: int) -> list[list[Any]]:
        return self.live.search_batch(queries, k)

    def rows(self, answer: list[list[Any]], k: int) -> np.ndarray:
        out = np.full((len(answer), k), -1, np.int64)
        for row, hits in zip(out, answer, strict=True):
            row[: len(hits)] = [int(hit.id) for hit in hits]
        return out

    def search_library(self, queries: np.ndarray, k: int) -> Any:
        """ScaNN's own answers, by the same searcher, as fast as it gives them; exact where there
        is none."""
        if self.searcher is None:
            return self.search(queries, k)
        asked = self.searcher.asked(k + self._in_excess)
        if len(queries) == 1:
            return self.searcher.library.search(queries[0], *asked)[0][None]
        share = math.ceil(len(queries) / self.count)
        return self.searcher.library.search_batched_parallel(queries, *asked, batch_size=share)[0]

    def library_rows(self, answer: Any, k: int) -> np.ndarray:
        return self.rows(answer, k) if self.searcher is None else answer[:, :k].astype(np.int64)


CONTENDERS = {
    "ours": Ours,
    "faiss flat": FaissFlat,
    "faiss ivf": FaissIvf,
    "faiss ivf-pq fast-scan": FaissIvfPq,
    "faiss hnsw": FaissHnsw,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
}
# The library alone, with ours' searcher: what ours adds to it is the difference.
LIBRARY = "scann library"
GRAPHS = ("faiss hnsw", "hnswlib", "usearch")
PACKAGES = ("faiss-cpu", "hnswlib", "usearch")


def _lists(rows: int) -> int:
    return max(4, round(math.sqrt(rows)))
