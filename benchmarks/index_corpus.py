"""The durable side: upserts a second, the start with a whole corpus, and searches through gRPC."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.environment import ROOT
from benchmarks.vectors import Data
from tte.v1 import index_pb2, index_pb2_grpc
from tte_jax import codec
from tte_jax.client.channel import OPTIONS
from tte_jax.content import Content, Document, Reasoning
from tte_jax.corpus.store import CorpusStore
from tte_jax.index import CorpusIndex, IndexConfig
from tte_jax.stages import IndexEntry

BATCH = 32
UPSERT_BATCH = 100


def entry(number: int, vector: np.ndarray) -> IndexEntry:
    """A document as an ingest writes it: a short text, an ECR of a sentence, two fields."""
    answer = f"Answer: document {number} of the benchmark"
    ecr = f"<think>A document about {number}.</think>\n{answer}"
    return IndexEntry(
        Document(
            f"{number:08d}",
            Content.of(f"document {number}"),
            {"shelf": number % 10, "name": f"n{number}"},
            Reasoning(ecr, "", answer, 24, False),
        ),
        vector,
        "reasoner@64",
        "bench",
    )


def upserts(folder: Path, vectors: np.ndarray, *, count: int) -> dict[str, Any]:
    """Durable upserts a second into a new corpus: in process at batch 100, with one writer."""
    shutil.rmtree(folder, ignore_errors=True)
    index = CorpusIndex.open(folder)
    try:
        entries = [entry(i, vectors[i % len(vectors)]) for i in range(count)]
        spent: list[float] = []
        for start in range(0, count, UPSERT_BATCH):
            began = time.perf_counter()
            index.upsert(entries[start : start + UPSERT_BATCH])
            spent.append(time.perf_counter() - began)
        index.maintenance.join(600)
        problems = index.verify()
    finally:
        index.close()
        shutil.rmtree(folder, ignore_errors=True)
    if problems:
        raise RuntimeError(f"the corpus is not what was written: {problems[:3]}")
    return {
        "documents": count,
        "batch": UPSERT_BATCH,
        "per_second": round(count / sum(spent), 1),
        "batch_p50_ms": round(float(np.percentile(spent, 50)) * 1e3, 2),
        "batch_p99_ms": round(float(np.percentile(spent, 99)) * 1e3, 2),
    }


def fill(data_dir: Path, vectors: np.ndarray) -> float:
    """A corpus of these vectors with a snapshot, unless it is there; returns the seconds."""
    corpus, done = data_dir / "corpus", data_dir / "filled"
    if done.exists():
        return 0.0
    shutil.rmtree(corpus, ignore_errors=True)
    began = time.perf_counter()
    store = CorpusStore.open(corpus)
    try:
        for start in range(0, len(vectors), 5000):
            part = np.asarray(vectors[start : start + 5000])
            store.upsert([entry(start + i, vector) for i, vector in enumerate(part)])
    finally:
        store.close()
    quiet = IndexConfig(exact_below=2**62)
    index = CorpusIndex.open(corpus, config=quiet)
    index.snapshot()
    index.close()
    done.touch()
    return time.perf_counter() - began


@contextmanager
def service(data_dir: Path, log: Path) -> Iterator[tuple[str, float]]:
    """The index service as a process: its address, and seconds from its start to SERVING."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "servers", "index", f"--port={port}", f"--data-dir={data_dir}"]
    began = time.perf_counter()
    with open(log, "wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
    try:
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address, options=OPTIONS) as channel:
            stub = index_pb2_grpc.IndexServiceStub(channel)
            _until(lambda: stub.Stats(index_pb2.StatsRequest(), timeout=60), process, 600.0)
        yield address, time.perf_counter() - began
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(600)


def through_grpc(address: str, data: Data, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Batches of 32 and single searches for k = 10 through the service, ids only in batches.

    The best of `rounds`, with one caller and with two. Requests are made before, answers are parsed
    by gRPC and not looked at, since this process shares the cores with the service; recall is taken
    once, before.
    """
    queries, truth = np.load(data.queries), np.load(data.truth)
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        began = time.perf_counter()
        # The searcher is trained after the start, beside serving.
        while True:
            stats = stub.Stats(index_pb2.StatsRequest())
            due = stats.documents >= IndexConfig().exact_below and stats.kind == "exact"
            if not stats.rebuilding and (not due or stats.last_error):
                break
            time.sleep(0.5)
        out: dict[str, Any] = {
            "searcher": stats.kind,
            "searcher_ready_s": round(time.perf_counter() - began, 1),
        }
        batches = [
            index_pb2.SearchBatchRequest(
                vectors=[codec.encode_vector(q) for q in queries[at : at + BATCH]],
                k=10,
                ids_only=True,
            )
            for at in range(0, len(queries) - BATCH + 1, BATCH)
        ]
        singles = [
            index_pb2.IndexServiceSearchRequest(vector=codec.encode_vector(q), k=10)
            for q in queries[:200]
        ]
        right = asked = 0
        for number, request in enumerate(batches):
            for i, result in enumerate(stub.SearchBatch(request).results):
                best = set(truth[number * BATCH + i, :10].tolist())
                right += len(best & {int(hit.id) for hit in result.hits})
                asked += len(best)
        out["recall"] = round(right / asked, 4)
        for callers in (1, 2):
            for name, call, requests, size in (
                (f"batch32_qps_{callers}", stub.SearchBatch, batches, BATCH),
                (f"single_qps_{callers}", stub.Search, singles, 1),
            ):
                rates = [_rate(call, requests, callers, seconds) * size for _ in range(rounds)]
                out[name] = round(max(rates), 1)
        return out


def in_process(
    data_dir: Path, data: Data, *, threads: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """The same as `through_grpc`, without gRPC: `CorpusIndex` in this process."""
    queries = np.load(data.queries)
    config = IndexConfig(check_every=2**62, search_threads=threads)
    index = CorpusIndex.open(data_dir / "corpus", config=config)
    try:
        index.maintenance.join(3600)
        batches = [queries[at : at + BATCH] for at in range(0, len(queries) - BATCH + 1, BATCH)]
        out: dict[str, Any] = {"searcher": index.stats().searcher}
        for callers in (1, 2):
            out[f"batch32_qps_{callers}"] = round(
                BATCH
                * max(
                    _rate(
                        lambda b: index.search_batch(b, 10, ids_only=True),
                        batches, callers, seconds,
                    )
                    for _ in range(rounds)
                ),
                1,
            )  # fmt: skip
            singles = list(queries[:200])
            out[f"single_qps_{callers}"] = round(
                max(
                    _rate(lambda q: index.search(q, 10), singles, callers, seconds)
                    for _ in range(rounds)
                ),
                1,
            )
        return out
    finally:
        index.close()


def _rate(call: Callable[[Any], Any], requests: list, callers: int, seconds: float) -> float:
    """Calls a second of `callers` threads in a closed loop."""
    call(requests[0])
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def work(me: int) -> None:
        while time.perf_counter() < until:
            call(requests[(me + counts[me] * callers) % len(requests)])
            counts[me] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(me,)) for me in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def _until(ready: Callable[[], Any], process: subprocess.Popen, limit_s: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if process.poll() is not None:
            raise RuntimeError(f"the index service ended with exit code {process.returncode}")
        try:
            ready()
            return
        except grpc.RpcError:
            time.sleep(0.02)
    raise RuntimeError(f"the index service did not serve within {limit_s:.0f} s")
