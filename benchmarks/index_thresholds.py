"""From how many documents on hashing beats exact search, and the tree beats hashing.

Every kind is measured at the effort that reaches the same recall on the same queries, so that only
speed is left to compare. `IndexConfig.exact_below` and `tree_from` are set from these figures.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.vectors import exact_answers
from tte_jax.index import IndexConfig, LiveIndex
from tte_jax.index.generation import Rows

KINDS = ("exact", "scann-ah", "scann-tree-ah")


def measure(
    vectors: np.ndarray,
    queries: np.ndarray,
    *,
    recall: float,
    threads: int,
    seconds: float,
    rounds: int,
    k: int = 10,
) -> dict[str, Any]:
    """{kind: {"build_s", "recall", "effort", "single_us", "batch32_us"}} over these vectors.

    Times are per query: the 5th percentile of the calls of a round of `seconds`, the best of
    `rounds` interleaved rounds. That is what a call costs by itself, also on a machine that does
    other work now and then.
    """
    truth = exact_answers(vectors, queries, k)
    lives: dict[str, LiveIndex] = {}
    out: dict[str, Any] = {}
    for kind in KINDS:
        rows = Rows(
            [str(i) for i in range(len(vectors))],
            vectors,
            np.arange(1, len(vectors) + 1),
            [{}] * len(vectors),
        )
        config = IndexConfig(
            exact_below=2**62 if kind == "exact" else 1,
            tree_from=1 if kind == "scann-tree-ah" else 2**62,
            recall_floor=0.0,  # the effort is chosen below, by these queries
            check_every=2**62,
            build_threads=threads,
            search_threads=threads,
        )
        live = LiveIndex(rows, sequence=len(vectors), config=config)
        began = time.perf_counter()
        live.rebuild()
        out[kind] = {"build_s": round(time.perf_counter() - began, 2)}
        searcher: Any = live.view.generation.searcher
        while True:
            reached = _recall(live.search_batch(queries, k), truth)
            if reached >= recall or searcher is None or not searcher.search_harder():
                break
        out[kind] |= {
            "recall": round(reached, 4),
            "effort": list(searcher.effort) if searcher else [],
            "single_us": float("inf"),
            "batch32_us": float("inf"),
        }
        lives[kind] = live
    for _ in range(rounds):
        for kind, live in lives.items():
            for name, size in (("single_us", 1), ("batch32_us", 32)):
                spent = _per_query(live, queries, k, size, seconds)
                out[kind][name] = round(min(out[kind][name], spent), 1)
    return out


def crossover(sizes: list[int], figures: list[dict[str, Any]], slow: str, fast: str) -> int | None:
    """The least size from which on `fast` answers single queries sooner than `slow`, between the
    measured sizes by a straight line through the logarithms; None when it never does."""
    gains = [np.log(f[slow]["single_us"] / f[fast]["single_us"]) for f in figures]
    if not gains or gains[-1] <= 0:
        return None
    last_loss = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last_loss is None:
        return sizes[0]
    low, high = np.log(sizes[last_loss]), np.log(sizes[last_loss + 1])
    share = -gains[last_loss] / (gains[last_loss + 1] - gains[last_loss])
    return int(round(np.exp(low + share * (high - low)), -2))


def _recall(found: list, truth: np.ndarray) -> float:
    right = sum(
        len({int(hit.id) for hit in hits} & set(best.tolist()))
        for hits, best in zip(found, truth, strict=True)
    )
    return right / truth.size


def _per_query(live: LiveIndex, queries: np.ndarray, k: int, size: int, seconds: float) -> float:
    live.search_batch(queries[:size], k)
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while not spent or time.perf_counter() < until:
        at = len(spent) * size % (len(queries) - size + 1)
        began = time.perf_counter()
        live.search_batch(queries[at : at + size], k)
        spent.append(time.perf_counter() - began)
    return float(np.percentile(spent, 5)) / size * 1e6
