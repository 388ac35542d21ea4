"""The durable side: upserts a second, the start with a whole corpus, and searches through gRPC."""

from __future__ import annotations

import json
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
VALUES = (-4, -2, -1, 0, 1, 2, 4)  # see `index_service.scaled`
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
    began = time.perf_counter()
    store = CorpusStore.open(corpus)
    try:
        for start in range(store.count(), len(vectors), 5000):  # the rest of an interrupted one
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
    with _process(("servers", "index"), data_dir, log) as (_, address, ready_s):
        yield address, ready_s


@contextmanager
def _process(
    module: tuple[str, ...], data_dir: Path, log: Path
) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *module, f"--port={port}", f"--data-dir={data_dir}"]
    began = time.perf_counter()
    with open(log, "wb") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
    try:
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address, options=OPTIONS) as channel:
            stub = index_pb2_grpc.IndexServiceStub(channel)
            _until(lambda: stub.Stats(index_pb2.StatsRequest(), timeout=60), process, 600.0)
        yield process, address, time.perf_counter() - began
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(600)


def searches(
    data_dir: Path, data: Data, log: Path, *, seconds: float, rounds: int
) -> dict[str, Any]:
    """One corpus, one process, one searcher: searched through gRPC and in process, in turns.

    Returns {"grpc", "in_process"}: [{"value", "k", "recall", "batch32_qps", "single_qps"}], and
    {"chosen"}: both at the effort that the searcher chose itself, k = 10, batches of 32, the better
    of one caller and of two; its recall.
    """
    queries, truth = np.load(data.queries), np.load(data.truth)
    module = ("benchmarks.index_service",)
    with (
        _process(module, data_dir, log) as (process, address, _),
        grpc.insecure_channel(address, options=OPTIONS) as channel,
    ):
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
            "documents": data.rows,
            "searcher": stats.kind,
            "searcher_ready_s": round(time.perf_counter() - began, 1),
            "grpc": [],
            "in_process": [],
        }

        def both(k: int, callers: int) -> tuple[dict[str, float], dict[str, float]]:
            """The best of the rounds of each way."""
            ways: tuple[dict[str, float], dict[str, float]] = ({}, {})
            how = {"k": k, "callers": callers, "seconds": seconds, "queries": str(data.queries)}
            for _ in range(rounds):
                found = (
                    through_grpc(stub, queries, k=k, callers=callers, seconds=seconds),
                    _told(process, {"measure": how}),
                )
                for best, now in zip(ways, found, strict=True):
                    best.update({name: max(now[name], best.get(name, 0.0)) for name in now})
            return ways

        for value in VALUES if stats.kind != "exact" else [0]:
            _told(process, {"value": value})
            for k in (10, 100):
                recall = _recall(stub, queries, truth, k)
                for way, best in zip(("grpc", "in_process"), both(k, 2), strict=True):
                    out[way].append({"value": value, "k": k, "recall": recall} | best)
        _told(process, {"value": 0})
        rates = [[best["batch32_qps"] for best in both(10, callers)] for callers in (1, 2)]
        grpc_qps, in_process_qps = np.max(rates, axis=0).tolist()
        out["chosen"] = {"grpc": grpc_qps, "in_process": in_process_qps}
        out["chosen"]["recall"] = _recall(stub, queries, truth, 10)
        return out


def through_grpc(
    stub: index_pb2_grpc.IndexServiceStub,
    queries: np.ndarray,
    *,
    k: int,
    callers: int,
    seconds: float,
) -> dict[str, float]:
    """{"batch32_qps", "single_qps"}: `SearchBatch` of ids with so many callers, `Search` with one.

    Requests are made before, answers are parsed by gRPC and not looked at, since this process
    shares the cores with the service.
    """
    batches = [_request(part, k) for part in _parts(queries)]
    singles = [
        index_pb2.IndexServiceSearchRequest(vector=codec.encode_vector(q), k=k)
        for q in queries[:200]
    ]
    return {
        "batch32_qps": round(_rate(stub.SearchBatch, batches, callers, seconds) * BATCH, 1),
        "single_qps": round(_rate(stub.Search, singles, 1, seconds), 1),
    }


def in_process(
    index: CorpusIndex, *, queries: str, k: int, callers: int, seconds: float
) -> dict[str, float]:
    """What `through_grpc` measures, without gRPC; `queries` is a file."""
    every = np.load(queries)
    batch = lambda part: index.search_batch(part, k, ids_only=True)  # noqa: E731
    single = lambda query: index.search(query, k)  # noqa: E731
    return {
        "batch32_qps": round(_rate(batch, _parts(every), callers, seconds) * BATCH, 1),
        "single_qps": round(_rate(single, list(every[:200]), 1, seconds), 1),
    }


def _parts(queries: np.ndarray) -> list[np.ndarray]:
    return [queries[at : at + BATCH] for at in range(0, len(queries) - BATCH + 1, BATCH)]


def _request(queries: np.ndarray, k: int) -> index_pb2.SearchBatchRequest:
    vectors = [codec.encode_vector(query) for query in queries]
    return index_pb2.SearchBatchRequest(vectors=vectors, k=k, ids_only=True)


def _recall(
    stub: index_pb2_grpc.IndexServiceStub, queries: np.ndarray, truth: np.ndarray, k: int
) -> float:
    right = asked = 0
    for number, part in enumerate(_parts(queries)):
        for i, result in enumerate(stub.SearchBatch(_request(part, k)).results):
            best = set(truth[number * BATCH + i, :k].tolist())
            right += len(best & {int(hit.id) for hit in result.hits})
            asked += len(best)
    return round(right / asked, 4)


def _told(process: subprocess.Popen[str], command: dict[str, Any]) -> Any:
    """What `benchmarks.index_service` answers to a command."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the service died with exit code {process.wait(30)}")
    return json.loads(line)


def _rate(call: Callable[[Any], Any], requests: list, callers: int, seconds: float) -> float:
    """Calls a second of `callers` threads in a closed loop."""
    call(requests[0])
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def work(me: int) -> None:
        while not counts[me] or time.perf_counter() < until:
            call(requests[(me + counts[me] * callers) % len(requests)])
            counts[me] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(me,)) for me in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def _until(ready: Callable[[], Any], process: subprocess.Popen[str], limit_s: float) -> None:
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
