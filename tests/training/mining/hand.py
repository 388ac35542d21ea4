"""Models whose answers can be worked out by hand, and a trainer that really learns.

A text's vector is its letter counts times a matrix; the retriever's "weights" are that matrix, in
`w.npy` of a model directory, and training is gradient descent on InfoNCE with the mined negatives.
The reranker's P(yes) is the share of the query's words that the candidate has. It stands behind the
real servicer, so that what is tested is the service's own stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tte_jax.content import Usage
from tte_jax.corpus.durable import write_atomically
from tte_jax.errors import InvalidInputError
from tte_jax.stages import EmbedItem

LETTERS = 26


def letter_counts(text: str) -> np.ndarray:
    """[26] float32, of unit length."""
    counts = np.zeros(LETTERS, np.float32)
    for letter in text.lower():
        if "a" <= letter <= "z":
            counts[ord(letter) - ord("a")] += 1
    return counts / max(float(np.linalg.norm(counts)), 1e-9)


def write_model(folder: Path, matrix: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    np.save(out, np.eye(LETTERS, dtype=np.float32) if matrix is None else matrix)
    write_atomically(folder / "w.npy", out.getvalue())
    return folder


class HandEmbedder:
    """`EmbedderStage`; `delay_s` per request."""

    def __init__(self, matrix: np.ndarray, delay_s: float = 0.0) -> None:
        self._matrix, self._delay_s = matrix, delay_s
        self.version = hashlib.sha256(matrix.tobytes()).hexdigest()[:12]
        self.requests: list[int] = []

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        await asyncio.sleep(self._delay_s)
        self.requests.append(len(items))
        rows = np.stack([letter_counts(f"{i.content.text} {i.reasoning}") for i in items])
        vectors = rows @ self._matrix
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return vectors, Usage("embed", model_version=self.version)


def opener(delay_s: float = 0.0):
    """`open_embedder` of the loop, over model directories of `write_model`."""

    @asynccontextmanager
    async def open_embedder(model: Path) -> AsyncIterator[HandEmbedder]:
        yield HandEmbedder(np.load(model / "w.npy"), delay_s)

    return open_embedder


def share_of_words(query: str, candidate: str) -> float:
    words = set(query.split())
    return len(words & set(candidate.split())) / len(words)


@dataclass(frozen=True)
class Job:
    score: float


class HandReranker:
    """What `RerankerServicer` needs of a `Reranker`; `delay_s` for every query.

    A candidate that holds "unreadable" is refused, as a text above a model's limits is.
    """

    stage, version = "rerank", "hand@1"
    ready, accepts_media = True, False
    max_sequence_tokens, max_new_tokens, compile_count, warm_compile_count = 64, 0, 0, 0

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.queries: list[str] = []
        self.host_pool = self.query_pool = ThreadPoolExecutor(1)
        self.served = SimpleNamespace(
            name="hand",
            config=SimpleNamespace(model_type="words"),
            dtype="float32",
            quantise=None,
        )
        self.queue = _Queue()

    def prepare(self, query: str, candidates: Sequence[str], instruction: str = "") -> list[Job]:
        for i, text in enumerate(candidates):
            if "unreadable" in text:
                raise InvalidInputError("the text is too long", field=f"candidates[{i}]")
        self.queries.append(query)
        time.sleep(self.delay_s)
        return [Job(share_of_words(query, text)) for text in candidates]

    def submit(self, jobs: Sequence[Job], **options: Any) -> list[Future[Job]]:
        futures: list[Future[Job]] = []
        for job in jobs:
            futures.append(Future())
            futures[-1].set_result(job)
        return futures

    def collect(self, scored: Sequence[Job]) -> tuple[np.ndarray, Usage]:
        scores = np.array([one.score for one in scored], np.float32)
        return scores, Usage(self.stage, model_version=self.version)


class _Queue:
    capacity = 1

    def __len__(self) -> int:
        return 0


def train(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    start: Path,
    out: Path,
    *,
    steps: int = 12,
    rate: float = 0.3,
    delay_s: float = 0.0,
) -> list[float]:
    """Descends InfoNCE of (query [26], positive [26], negatives [K 26]) rows in W; a step at a
    time is written, so that a killed run goes on. Returns the losses of the steps it did."""
    matrix = np.load(start / "w.npy").astype(np.float64)
    first = 0
    if (out / "step.npy").exists():
        state = np.load(out / "step.npy")
        first, matrix = int(state[0, 0]), state[1:]
    losses = []
    for step in range(first, steps):
        loss, slope = 0.0, np.zeros_like(matrix)
        for query, positive, negatives in rows:
            documents = np.stack([positive, *negatives]).astype(np.float64)
            q = query.astype(np.float64)
            logits = 5.0 * (documents @ matrix.T) @ (matrix @ q)
            p = np.exp(logits - logits.max())
            p /= p.sum()
            loss -= float(np.log(p[0])) / len(rows)
            p[0] -= 1.0
            # d logits_j / dW = 5 (W d_j q^T + W q d_j^T)
            mixed = (p[:, None] * documents).sum(0)
            slope += 5.0 * (matrix @ (np.outer(mixed, q) + np.outer(q, mixed))) / len(rows)
        losses.append(loss)
        matrix = matrix - rate * slope
        out.mkdir(parents=True, exist_ok=True)
        state = io.BytesIO()
        np.save(state, np.concatenate([np.full((1, LETTERS), step + 1.0), matrix]))
        write_atomically(out / "step.npy", state.getvalue())
        time.sleep(delay_s)
    write_model(out, matrix.astype(np.float32))
    for left in (*out.glob(".*.tmp"), out / "step.npy"):  # a killed write leaves its beginning
        left.unlink()
    return losses


WORDS = "red blue old new big small owl hawk crow dove wren lark".split()


def example_rows(count: int = 30) -> list[dict]:
    """Queries of three words; the right document has all of them, and a name of its own."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * k + k) % len(WORDS)] for k in (1, 5, 7)]
        name = "n" + "abcdefghijklmnop"[i % 16] * (i + 1)
        rows.append(
            {
                "key": f"q{i}",
                "dataset": "ab"[i % 2],
                "query": " ".join(words),
                "positives": [" ".join([*reversed(words), name])],
            }
        )
    return rows


@asynccontextmanager
async def reranker_service(role: HandReranker, port: int = 0) -> AsyncIterator[str]:
    """Yields the address of the real servicer over `role`."""
    # Services bring JAX, which the processes that only train with these models do without.
    import grpc

    from servers.errors import ErrorInterceptor
    from servers.reranker import RerankerServicer
    from servers.runtime import SERVER_OPTIONS
    from tte.v1 import reranker_pb2_grpc

    server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=SERVER_OPTIONS)
    servicer = RerankerServicer(role)  # pyright: ignore[reportArgumentType]
    reranker_pb2_grpc.add_RerankerServiceServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)
