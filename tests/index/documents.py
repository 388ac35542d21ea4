"""Documents and vectors for tests of the corpus and the index."""

from __future__ import annotations

import numpy as np

from tte_jax.content import Content, Document, Metadata, Reasoning
from tte_jax.stages import IndexEntry


def unit(*values: float) -> np.ndarray:
    vector = np.asarray(values, np.float32)
    return vector / np.linalg.norm(vector)


def make_entry(
    id: str,
    vector: np.ndarray,
    *,
    text: str = "",
    image: bytes = b"",
    metadata: Metadata | None = None,
    embedder: str = "e1",
    reasoner: str = "r1",
) -> IndexEntry:
    text = text or f"text of {id}"
    content = Content.of(text, image) if image else Content.of(text)
    reasoning = Reasoning(f"<think>{id}</think>\nAnswer: {id}", id, id, 7, False)
    return IndexEntry(Document(id, content, metadata or {}, reasoning), vector, reasoner, embedder)


def random_units(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered_units(
    rng: np.random.Generator, count: int, dimension: int, clusters: int = 40
) -> np.ndarray:
    centres = rng.standard_normal((clusters, dimension))
    points = centres[rng.integers(clusters, size=count)]
    points = points + 0.5 * rng.standard_normal((count, dimension))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
