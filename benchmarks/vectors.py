"""Vectors that look like embeddings, and the exact answers to queries among them.

A mixture whose clusters overlap: with well-separated clusters every index reaches recall 1.0 and
the benchmark says nothing. A document is

    x = normalise((c[cluster] + 0.9 g) A + 0.3 h)        c, g ∈ R^48, h ∈ R^256, all Gaussian

with N / 50 clusters of unequal size (Zipf), of unit variance in a space of 48 dimensions (A spreads
them over 256), and noise in all of them: the nearest neighbours of a document come from several
clusters. A query is drawn in the same way, then moved by a fixed offset, as the questions of one
modality lie off the documents of another. Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIMENSION = 256
_LATENT = 48
_SPREAD, _NOISE, _OFFSET = 0.9, 0.3, 0.25
_CHUNK = 50_000


@dataclass(frozen=True)
class Data:
    """Files of one data set.

    Attributes:
      vectors: [N, D] float32 unit vectors, as `.npy`.
      queries: [Q, D] float32 unit vectors.
      truth: [Q, 100] int64, the rows nearest to each query, best first.
    """

    folder: Path
    rows: int

    @property
    def vectors(self) -> Path:
        return self.folder / "vectors.npy"

    @property
    def queries(self) -> Path:
        return self.folder / "queries.npy"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.npy"


def generate(folder: Path, rows: int, queries: int, *, seed: int = 0) -> Data:
    """Make the data set in `folder`, unless it is there."""
    data = Data(folder, rows)
    if data.truth.exists():
        return data
    folder.mkdir(parents=True, exist_ok=True)
    mixture = _Mixture(rows, seed)
    out = np.lib.format.open_memmap(data.vectors, "w+", np.float32, (rows, DIMENSION))
    for start in range(0, rows, _CHUNK):
        end = min(rows, start + _CHUNK)
        out[start:end] = mixture.draw(np.random.default_rng((seed, 1, start)), end - start)
    out.flush()
    asked = mixture.draw(np.random.default_rng((seed, 2)), queries, offset=_OFFSET)
    return _finish(data, np.load(data.vectors, mmap_mode="r"), asked)


def from_vectors(folder: Path, vectors: np.ndarray, queries: int, *, seed: int = 0) -> Data:
    """A data set of given unit vectors: `queries` of them, at random, are asked and not kept."""
    order = np.random.default_rng(seed).permutation(len(vectors))
    folder.mkdir(parents=True, exist_ok=True)
    data = Data(folder, len(vectors) - queries)
    kept = np.ascontiguousarray(vectors[order[queries:]], np.float32)
    np.save(data.vectors, kept)
    return _finish(data, kept, np.ascontiguousarray(vectors[order[:queries]], np.float32))


class _Mixture:
    def __init__(self, rows: int, seed: int) -> None:
        rng = np.random.default_rng((seed, 0))
        clusters = max(20, rows // 50)
        self.centres = rng.standard_normal((clusters, _LATENT))
        self.spread = rng.standard_normal((_LATENT, DIMENSION)) / np.sqrt(_LATENT)
        weights = 1.0 / np.arange(1, clusters + 1) ** 0.7
        self.weights = weights / weights.sum()
        self.offset = rng.standard_normal(DIMENSION)

    def draw(self, rng: np.random.Generator, count: int, *, offset: float = 0.0) -> np.ndarray:
        cluster = rng.choice(len(self.weights), size=count, p=self.weights)
        latent = self.centres[cluster] + _SPREAD * rng.standard_normal((count, _LATENT))
        out = latent @ self.spread + _NOISE * rng.standard_normal((count, DIMENSION))
        out += offset * self.offset
        return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


def _finish(data: Data, vectors: np.ndarray, queries: np.ndarray) -> Data:
    np.save(data.queries, queries)
    truth = exact_answers(vectors, queries, min(100, len(vectors)))
    draft = data.truth.with_name("truth.draft.npy")
    np.save(draft, truth)
    draft.rename(data.truth)  # last of all: what has a truth is complete
    return data


def exact_answers(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """[Q, k] int64 rows of highest dot product, best first."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for start, chunk in _chunks(vectors):
        scores = np.concatenate([best, queries @ chunk.T], axis=1)
        places = np.concatenate(
            [rows, np.broadcast_to(start + np.arange(len(chunk)), (len(queries), len(chunk)))],
            axis=1,
        )
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best = np.take_along_axis(scores, top, axis=1)
        rows = np.take_along_axis(places, top, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)


def _chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), 20_000):
        yield start, np.asarray(vectors[start : start + 20_000])
