"""The index against FAISS, hnswlib and usearch, and its durable side: `make bench-index`.

    python -m benchmarks.index                                # everything, which takes long
    python -m benchmarks.index --sizes 1000000 --contenders hnswlib --parts contenders

It consists of pieces: each contender over each data set (built and measured in a process of its
own, alone on the machine), each size of the thresholds, the durable upserts, the served corpus. A
piece that is finished is kept in the result file with the commit, the load of the machine and the
time that it took; graphs are saved while they are built. So the same command goes on after an
interruption, and options choose what to do now. `--fresh` forgets everything. Needs the extra
`bench`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import (
    environment,
    index_corpus,
    index_summary,
    index_thresholds,
    markdown,
    vectors,
)
from benchmarks.contender_process import ContenderProcess
from benchmarks.contenders import CONTENDERS, LIBRARY, PACKAGES
from benchmarks.index_summary import KS, RECALL
from tte_jax.corpus.store import DATABASE, CorpusStore

PARTS = ("contenders", "thresholds", "upserts", "served")
CORPUS_SET = "corpus"


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      sizes: numbers of generated vectors (`benchmarks/vectors.py`).
      corpus: a corpus directory whose vectors are measured too; by default the one that `make demo`
        fills.
      contenders: which; all by default.
      parts: what to do now, of contenders, thresholds, upserts and served.
      threads: for building, and for batches; single queries use one.
      queries: how many differ.
      seconds: of one slice: one contender, one parameter, one k, one mode.
      rounds: slices of each.
      threshold_sizes: where exact search, hashing and the tree are compared; those above the
        largest size are left out.
      upserts: documents written to measure durable upserts.
      work_dir: data, built indices and corpora; kept for the next run.
      fresh: forget every result and built index.
      out: the result.
    """

    sizes: tuple[int, ...] = (
        100_000,
        1_000_000,
    )
    corpus: Path = Path(".tte/demo/corpus")
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    parts: tuple[str, ...] = PARTS
    threads: int = 2
    queries: int = 1000
    seconds: float = 0.4
    rounds: int = 3
    threshold_sizes: tuple[int, ...] = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
    upserts: int = 10_000
    work_dir: Path = Path(".tte/bench-index")
    fresh: bool = False
    out: Path = Path("benchmarks/results/index.json")


class Results:
    """The result file: written after every piece, and read back when the same settings go on."""

    def __init__(self, config: Config, settings: dict[str, Any]) -> None:
        self.path = config.out
        self.content: dict[str, Any] = {"settings": settings}
        if not config.fresh and self.path.exists():
            before = json.loads(self.path.read_text())
            if before.get("settings") != settings:
                raise SystemExit(
                    f"{self.path} was measured with other settings. Give those, or --fresh."
                )
            self.content = before
            print(f"going on with {self.path}", flush=True)
        self.content |= environment.describe("benchmarks.index", [])  # pieces have their options
        self.content["versions"] |= {name: metadata.version(name) for name in PACKAGES}
        self.content.setdefault("pieces", {})

    def step(self, place: list[str], work: Callable[[], Any]) -> Any:
        """The value at `place`, made by `work` unless it is there."""
        at = self.content
        for name in place[:-1]:
            at = at.setdefault(name, {})
        if place[-1] not in at:
            name = " / ".join(place)
            print(f"--- {name}", flush=True)
            load, began = environment.foreign_load(2.0), time.perf_counter()
            at[place[-1]] = work()
            took = round(time.perf_counter() - began, 1)
            self.content["pieces"][name] = {
                "seconds": took,
                "foreign_load": load,
                "noisy": environment.noisy(load),
                "commit": self.content["commit"],
                "date": self.content["date"],
            }
            print(f"    {took} s", flush=True)
            self.write()
        return at[place[-1]]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)


def main(config: Config) -> int:
    for given, known in ((config.contenders, CONTENDERS), (config.parts, PARTS)):
        if unknown := set(given) - set(known):
            print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
            return 2
    if config.fresh:
        shutil.rmtree(config.work_dir, ignore_errors=True)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(config, name) for name in ("threads", "queries", "seconds", "rounds")
    } | {"dimension": vectors.DIMENSION, "generator": "benchmarks/vectors.py"}
    results = Results(config, settings)
    if "contenders" in config.parts:
        for size in config.sizes:
            compare(str(size), _generated(size, config), config, results)
        if (config.corpus / DATABASE).is_file():
            compare(CORPUS_SET, _of_corpus(config), config, results)
        else:
            print(f"there is no corpus in {config.corpus}: `make demo` fills one")
    largest = _generated(max(config.sizes), config)
    if "thresholds" in config.parts:
        thresholds(largest, config, results)
    if "upserts" in config.parts:
        results.step(
            ["upserts"],
            lambda: index_corpus.upserts(
                config.work_dir / "upserts", np.load(largest.vectors, mmap_mode="r"),
                count=config.upserts,
            ),
        )  # fmt: skip
    if "served" in config.parts:
        served(largest, config, results)

    pieces = results.content["pieces"]
    results.content |= {
        "noisy": any(piece["noisy"] for piece in pieces.values()),
        "speeds": [list(row) for row in index_summary.speeds(results.content)],
        "table": [list(row) for row in index_summary.goals(results.content)],
    }
    results.write()
    print(markdown.table(index_summary.SPEEDS, results.content["speeds"]))
    print(markdown.table(index_summary.GOALS, results.content["table"]))
    loud = [name for name, piece in pieces.items() if piece["noisy"]]
    print(f"Wrote {config.out}." + (f" Other work ran beside: {', '.join(loud)}." if loud else ""))
    return 0


def compare(name: str, data: vectors.Data, config: Config, results: Results) -> None:
    """Builds and measures the contenders over `data`, one after the other."""
    for contender in config.contenders:
        results.step(
            ["sets", name, contender],
            lambda contender=contender: _contend(contender, data, config),
        )


def _contend(name: str, data: vectors.Data, config: Config) -> dict[str, Any]:
    """{"rows", "build", "points"}, or {"rows", "error"} when it cannot be built."""
    process = ContenderProcess(name, data, data.folder / "built", config.threads)
    try:
        built = process.build()
        print(f"    built in {built['build_s']} s, {built['memory_mb']} MB", flush=True)
        return {"rows": data.rows, "build": built, "points": _points(process, built, config)}
    except RuntimeError as error:
        print(f"    failed: {error}", flush=True)
        return {"rows": data.rows, "error": str(error)[-500:]}
    finally:
        process.stop()


def _points(
    process: ContenderProcess, built: dict[str, Any], config: Config
) -> list[dict[str, Any]]:
    """Every (value, k, mode): the best and the median QPS of the rounds, the recall. Slices of one
    round come in a random order, so that a disturbance does not meet all rounds of one point."""
    wanted = [
        {"contender": variant, "value": value, "k": k, "mode": mode}
        for variant in ((process.name, LIBRARY) if process.name == "ours" else (process.name,))
        for value in built["values"]
        for k in KS
        for mode in ("batch", "single")
    ]
    shuffle = random.Random(0)
    slices: list[list[dict[str, Any]]] = [[] for _ in wanted]
    for _ in range(config.rounds):
        order = list(range(len(wanted)))
        shuffle.shuffle(order)
        for at in order:
            point = wanted[at]
            slices[at].append(
                process.measure(
                    value=point["value"], k=point["k"], mode=point["mode"],
                    variant=point["contender"], seconds=config.seconds,
                )
            )  # fmt: skip
    points = []
    for point, some in zip(wanted, slices, strict=True):
        rates = [one["qps"] for one in some]
        best = max(some, key=lambda one: one["qps"])
        points.append(
            point
            | {
                "qps": round(max(rates), 1),
                "qps_median": round(statistics.median(rates), 1),
                "recall": round(some[0]["recall"], 4),
            }
            | {key: round(best[key], 1) for key in ("p50_us", "p99_us") if key in best}
        )
    return points


def thresholds(data: vectors.Data, config: Config, results: Results) -> None:
    every = np.load(data.vectors, mmap_mode="r")
    queries = np.load(data.queries)[:200]
    sizes = [size for size in config.threshold_sizes if 256 <= size <= len(every)]
    for size in sizes:
        results.step(
            ["thresholds", str(size)],
            lambda size=size: index_thresholds.measure(
                # Evenly drawn, so that every size has the same clusters.
                np.array(every[np.linspace(0, len(every) - 1, size).astype(int)]),
                queries, recall=RECALL, threads=config.threads,
                seconds=config.seconds, rounds=config.rounds,
            ),
        )  # fmt: skip
    figures = [results.content["thresholds"][str(size)] for size in sizes]
    results.content["crossovers"] = {
        "exact to hashing": index_thresholds.crossover(sizes, figures, "exact", "scann-ah"),
        "hashing to tree": index_thresholds.crossover(sizes, figures, "scann-ah", "scann-tree-ah"),
    }
    results.write()


def served(data: vectors.Data, config: Config, results: Results) -> None:
    """The corpus of the largest size: start of the service, and gRPC against in process."""
    home = config.work_dir / f"corpus-{data.rows}"
    home.mkdir(exist_ok=True)
    log = config.work_dir / "service.log"
    results.step(
        ["served", "fill_s"],
        lambda: round(index_corpus.fill(home, np.load(data.vectors, mmap_mode="r")), 1),
    )

    def start() -> dict[str, Any]:
        ready = []
        for _ in range(2):  # the first reads the files from the disk
            with index_corpus.service(home, log) as (_, seconds):
                ready.append(round(seconds, 2))
        return {"documents": data.rows, "seconds": ready}

    results.step(["served", "start"], start)
    results.step(
        ["served", "searches"],
        lambda: index_corpus.searches(
            home, data, log, seconds=2 * config.seconds, rounds=config.rounds
        ),
    )


def _generated(size: int, config: Config) -> vectors.Data:
    folder = config.work_dir / f"generated-{size}-{config.queries}"
    return vectors.generate(folder, size, config.queries)


def _of_corpus(config: Config) -> vectors.Data:
    store = CorpusStore.open(config.corpus, read_only=True)
    try:
        every = np.stack([one.vector for one in store.entries_of(store.ids())])
        name = f"corpus-{store.corpus_id[:8]}-{store.sequence}"
    finally:
        store.close()
    queries = min(config.queries, len(every) // 5)
    return vectors.from_vectors(config.work_dir / name, every, queries)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
