"""A contender in a process of its own: its memory is measured alone, a crash is its own, and its
thread pools cannot meet another's. It works only while it is asked."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, LIBRARY
from benchmarks.vectors import Data


class ContenderProcess:
    """Starts the process; every method waits for its answer.

    Raises RuntimeError with the contender's traceback when it fails or dies.
    """

    def __init__(self, name: str, data: Data, cache: Path, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        kept = {key: os.environ.get(key) for key in _POOLS}
        os.environ.update({key: str(threads) for key in _POOLS})
        try:
            self._process = context.Process(
                target=_work, args=(theirs, name, data, cache, threads), daemon=True
            )
            self._process.start()
        finally:
            for key, value in kept.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        theirs.close()

    def build(self) -> dict[str, Any]:
        """{"build_s", "memory_mb", "values", …}; a saved index is loaded with its old figures, and
        one that was interrupted is built on."""
        return self._ask("build")

    def measure(self, **how: Any) -> dict[str, Any]:
        """See `_measure`."""
        return self._ask("measure", **how)

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
        self._process.join(30)

    def _ask(self, what: str, **how: Any) -> dict[str, Any]:
        try:
            self._pipe.send((what, how))
            ok, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise RuntimeError(
                f"{self.name} died with exit code {self._process.exitcode}; out of memory?"
            ) from None
        if not ok:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


# A build is saved so often, so that a graph of an hour can be built in pieces.
_SAVE_EVERY_S = 60.0

# Every library's pool gets the same number of threads, and reads it when it is first imported.
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _work(pipe: Connection, name: str, data: Data, cache: Path, threads: int) -> None:
    contender = CONTENDERS[name]()
    vectors = np.load(data.vectors, mmap_mode="r")
    queries = np.load(data.queries)
    truth = np.load(data.truth)
    while True:
        try:
            what, how = pipe.recv()
        except EOFError:
            return
        try:
            if what == "build":
                answer = _build(contender, name, vectors, cache, threads)
            else:
                answer = _measure(contender, queries, truth, threads, **how)
            pipe.send((True, answer))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _build(
    contender: Any, name: str, vectors: np.ndarray, cache: Path, threads: int
) -> dict[str, Any]:
    path = cache / name.replace(" ", "-")
    note = path.with_suffix(".json")
    figures: dict[str, Any] = {"rows": 0, "build_s": 0.0}
    before = _anonymous_mb()
    if contender.saved and note.exists():
        figures = json.loads(note.read_text())
        contender.load(path, vectors)
    saved_at = time.perf_counter()
    while figures["rows"] < len(vectors):
        began = time.perf_counter()
        figures["rows"] = contender.build(vectors, threads, figures["rows"])
        figures["build_s"] = round(figures["build_s"] + time.perf_counter() - began, 2)
        figures["memory_mb"] = round(_anonymous_mb() - before, 1)
        complete = figures["rows"] == len(vectors)
        if contender.saved and (complete or time.perf_counter() - saved_at > _SAVE_EVERY_S):
            cache.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            contender.save(draft)
            # Interrupted in between, it is built anew rather than added to twice.
            note.unlink(missing_ok=True)
            os.replace(draft, path)
            note.write_text(json.dumps(figures))
            saved_at = time.perf_counter()
    figures["values"] = contender.values
    if report := getattr(contender, "report", None):
        figures |= {"kind": report.kind, "canary_recall": report.recall}
    return figures


def _measure(
    contender: Any,
    queries: np.ndarray,
    truth: np.ndarray,
    threads: int,
    *,
    value: Any,
    k: int,
    mode: str,
    seconds: float,
    variant: str = "",
    batch: int = 0,
) -> dict[str, Any]:
    """One slice of measuring.

    Args:
      value: the contender's parameter.
      mode: "batch" (all threads) or "single" (one query at a time, one thread).
      seconds: how long at least; every query is asked at least once in batch mode.
      variant: LIBRARY = the searcher under ours.
      batch: queries in a call; 0 = all.

    Returns {"qps", "recall"}, and {"p50_us", "p99_us"} of single queries.
    """
    search, to_rows = (
        (contender.search_library, contender.library_rows)
        if variant == LIBRARY
        else (contender.search, contender.rows)
    )
    contender.set(value)
    k_true = min(k, truth.shape[1])
    if mode == "single":
        contender.threads(1)
        search(queries[:1], k)
        answers: list[Any] = []
        times: list[float] = []
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            at = len(times) % len(queries)
            start = time.perf_counter()
            found = search(queries[at : at + 1], k)
            times.append(time.perf_counter() - start)
            if len(times) <= len(queries):
                answers.append(found)
        spent = np.array(times)
        found = np.concatenate([to_rows(answer, k) for answer in answers])
        return {
            "qps": len(times) / spent.sum(),
            "recall": _recall(found, truth[: len(found)], k_true),
            "p50_us": float(np.percentile(spent, 50) * 1e6),
            "p99_us": float(np.percentile(spent, 99) * 1e6),
        }
    contender.threads(threads)
    size = batch or len(queries)
    search(queries[:8], k)
    answered, first, began = 0, [], time.perf_counter()
    while answered < len(queries) or time.perf_counter() - began < seconds:
        at = answered % len(queries)
        found = search(queries[at : at + size], k)
        answered += min(size, len(queries) - at)
        if answered <= len(queries):
            first.append(found)
    spent_s = time.perf_counter() - began
    found = np.concatenate([to_rows(answer, k) for answer in first])
    return {
        "qps": answered / spent_s,
        "recall": _recall(found, truth[: len(found)], k_true),
    }


def _recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    right = sum(len(np.intersect1d(a[:k], b[:k])) for a, b in zip(found, truth, strict=True))
    return right / (k * len(truth))


def _anonymous_mb() -> float:
    """This process's own memory, without mapped files such as the vectors."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: Linux is needed to measure memory")
