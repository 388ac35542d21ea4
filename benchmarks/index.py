"""The index against FAISS, hnswlib and usearch, and its durable side: `make bench-index`.

    python -m benchmarks.index --sizes 100000 1000000

All contenders of a size are built one after the other, each in a process of its own; then all of
them are measured in turns, round by round, on the same cores with the same number of threads, so
that what else happens on the machine meets all alike. Built indices are kept under `--work-dir`,
and results are written after every step: run the same command again after an interruption and it
goes on. Needs the extra `bench`.
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

from benchmarks import environment, index_corpus, index_thresholds, markdown, vectors
from benchmarks.contender_process import ContenderProcess
from benchmarks.contenders import CONTENDERS, GRAPHS, LIBRARY, PACKAGES
from tte_jax.corpus.store import CorpusStore

KS = (10, 100)
RECALL = 0.95


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      sizes: numbers of generated vectors (`benchmarks/vectors.py`).
      corpus: a corpus directory whose vectors are measured too, e.g. `.tte/corpus`; empty = none.
      contenders: which; all by default.
      threads: for building, and for batches; single queries use one.
      queries: how many differ.
      seconds: of one slice: one contender, one parameter, one k, one mode.
      rounds: slices of each.
      threshold_sizes: where exact search, hashing and the tree are compared; those above the
        largest size are left out.
      upserts: documents written to measure durable upserts.
      work_dir: data, built indices and corpora; kept for the next run.
      fresh: forget the result of an interrupted run, and built indices.
      out: the result.
    """

    sizes: tuple[int, ...] = (
        100_000,
        1_000_000,
    )
    corpus: str = ""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
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
    """The result file: written after every step, and read back when the same run goes on."""

    def __init__(self, config: Config, settings: dict[str, Any]) -> None:
        self.path = config.out
        self.content: dict[str, Any] = {"settings": settings}
        if not config.fresh and self.path.exists():
            before = json.loads(self.path.read_text())
            # A finished run is measured again; its built indices are still there.
            if before.get("settings") == settings and not before.get("complete"):
                self.content = before
                print(f"going on with {self.path}", flush=True)
        self.content |= environment.describe("benchmarks.index")
        self.content["versions"] |= {name: metadata.version(name) for name in PACKAGES}
        self.content["complete"] = False

    def step(self, place: list[str], work: Callable[[], Any]) -> Any:
        """The value at `place`, made by `work` unless it is there."""
        at = self.content
        for name in place[:-1]:
            at = at.setdefault(name, {})
        if place[-1] not in at:
            print(f"--- {' / '.join(place)}", flush=True)
            began = time.perf_counter()
            at[place[-1]] = work()
            print(f"    {time.perf_counter() - began:.1f} s", flush=True)
            self.write()
        return at[place[-1]]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)


def main(config: Config) -> int:
    if unknown := set(config.contenders) - set(CONTENDERS):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
        return 2
    if config.fresh:
        shutil.rmtree(config.work_dir, ignore_errors=True)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(config, name)
        for name in ("corpus", "threads", "queries", "seconds", "rounds", "upserts")
    } | {
        "sizes": list(config.sizes),
        "contenders": list(config.contenders),
        "threshold_sizes": list(config.threshold_sizes),
        "dimension": vectors.DIMENSION,
        "generator": "benchmarks/vectors.py",
    }
    results = Results(config, settings)
    before = environment.foreign_load()
    sets: dict[str, vectors.Data] = {}
    for size in config.sizes:
        print(f"--- data of {size:,} vectors", flush=True)
        folder = config.work_dir / f"generated-{size}-{config.queries}"
        sets[f"{size}"] = vectors.generate(folder, size, config.queries)
    if config.corpus:
        sets["corpus"] = _of_corpus(Path(config.corpus), config)
    largest = sets[str(max(config.sizes))]

    for name, data in sets.items():
        compare(name, data, config, results)
    thresholds(largest, config, results)
    results.step(
        ["upserts"],
        lambda: index_corpus.upserts(
            config.work_dir / "upserts", np.load(largest.vectors, mmap_mode="r"),
            count=config.upserts,
        ),
    )  # fmt: skip
    served(largest, config, results)

    after = environment.foreign_load()
    results.content |= {
        "foreign_load": {"before": before, "after": after},
        "noisy": environment.noisy(before, after),
        "table": [list(row) for row in summary(results.content)],
        "complete": True,
    }
    results.write()
    print(markdown.table(("what", "figure", "goal", ""), results.content["table"]))
    quiet = "" if not results.content["noisy"] else " (noisy: other work ran beside it)"
    print(f"Wrote {config.out}{quiet}.")
    return 0


def compare(name: str, data: vectors.Data, config: Config, results: Results) -> None:
    """Builds every contender over `data`, then measures all of them in turns."""
    if "points" in results.content.get("sets", {}).get(name, {}):
        return
    running: dict[str, ContenderProcess] = {}
    try:
        for contender in config.contenders:
            process = ContenderProcess(contender, data, data.folder / "built", config.threads)
            built = results.content.setdefault("sets", {}).setdefault(name, {"rows": data.rows})
            print(f"--- {name} / {contender}", flush=True)
            try:
                figures = process.build()
            except RuntimeError as error:
                print(f"    failed: {error}", flush=True)
                built.setdefault("builds", {})[contender] = {"error": str(error)[-500:]}
                process.stop()
                continue
            # A second build of one that cannot be loaded is measured again.
            built.setdefault("builds", {})[contender] = figures
            print(f"    {figures['build_s']} s, {figures['memory_mb']} MB", flush=True)
            running[contender] = process
            results.write()
        builds = results.content["sets"][name]["builds"]
        results.step(["sets", name, "points"], lambda: _points(running, builds, config))
    finally:
        for process in running.values():
            process.stop()


def _points(
    running: dict[str, ContenderProcess], builds: dict[str, Any], config: Config
) -> list[dict[str, Any]]:
    """Every (contender, value, k, mode): the best and the median QPS of the rounds, the recall."""
    wanted = [
        {"contender": name, "value": value, "k": k, "mode": mode, "variant": variant}
        for name in running
        for variant in ((name, LIBRARY) if name == "ours" else (name,))
        for value in builds[name]["values"]
        for k in KS
        for mode in ("batch", "single")
    ]
    shuffle = random.Random(0)
    slices: list[list[dict[str, Any]]] = [[] for _ in wanted]
    for number in range(config.rounds):
        order = list(range(len(wanted)))
        shuffle.shuffle(order)
        for at in order:
            point = wanted[at]
            slices[at].append(
                running[point["contender"]].measure(
                    value=point["value"], k=point["k"], mode=point["mode"],
                    variant=point["variant"], seconds=config.seconds,
                )
            )  # fmt: skip
        print(f"    round {number + 1} of {config.rounds}", flush=True)
    points = []
    for point, some in zip(wanted, slices, strict=True):
        rates = [one["qps"] for one in some]
        best = max(some, key=lambda one: one["qps"])
        points.append(
            {key: point[key] for key in ("value", "k", "mode")}
            | {
                "contender": point["variant"],
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

    def remote() -> dict[str, Any]:
        with index_corpus.service(home, log) as (address, _):
            return index_corpus.through_grpc(
                address, data, seconds=5 * config.seconds, rounds=config.rounds
            )

    results.step(["served", "start"], start)
    results.step(["served", "grpc"], remote)
    results.step(
        ["served", "in_process"],
        lambda: index_corpus.in_process(
            home, data, threads=config.threads, seconds=5 * config.seconds, rounds=config.rounds
        ),
    )


def summary(content: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (what, figure, goal, ok or miss); "-" where there is nothing to compare."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, figure: float | None, goal: float, *, least: bool = True, unit: str = ""):
        if figure is None:
            rows.append((what, "-", f"{'≥' if least else '<'} {goal:g}{unit}", "miss"))
            return
        good = figure >= goal if least else figure < goal
        sign = "≥" if least else "<"
        rows.append(
            (what, f"{figure:.4g}{unit}", f"{sign} {goal:g}{unit}", "ok" if good else "miss")
        )

    for name, part in content.get("sets", {}).items():
        points = part.get("points", [])
        where = f"{name} vectors" if name != "corpus" else "the corpus's own vectors"
        for mode, goal in (("batch", 2.0), ("single", 1.0)):
            ours = best_qps(points, "ours", mode)
            graph = max(filter(None, (best_qps(points, g, mode) for g in GRAPHS)), default=None)
            ratio = ours / graph if ours and graph else None
            add(f"{where}, {mode}: QPS against the best graph index", ratio, goal, unit=" x")
        ours = best_qps(points, "ours", "batch")
        scan = best_qps(points, "faiss ivf-pq fast-scan", "batch")
        add(f"{where}, batch: QPS against FAISS IVF-PQ fast-scan",
            ours / scan if ours and scan else None, 1.0, unit=" x")  # fmt: skip
    if "upserts" in content:
        add("durable upserts a second, batches of 100", content["upserts"]["per_second"], 2000)
    served = content.get("served", {})
    if "start" in served:
        what = f"start of the service with {served['start']['documents']:,} documents"
        add(what, max(served["start"]["seconds"]), 20, least=False, unit=" s")
    if "grpc" in served and "in_process" in served:
        rate = {
            way: max(served[way][f"batch32_qps_{callers}"] for callers in (1, 2))
            for way in ("grpc", "in_process")
        }
        add("through gRPC against in process, batches of 32",
            rate["grpc"] / rate["in_process"], 0.8, unit=" x")  # fmt: skip
        add("recall@10 through gRPC", served["grpc"]["recall"], RECALL)
    return rows


def best_qps(
    points: list[dict[str, Any]], contender: str, mode: str, k: int = 10, recall: float = RECALL
) -> float | None:
    """The most queries a second with enough recall; None when no parameter reaches it."""
    return max(
        (
            p["qps"]
            for p in points
            if (p["contender"], p["mode"], p["k"]) == (contender, mode, k) and p["recall"] >= recall
        ),
        default=None,
    )


def _of_corpus(path: Path, config: Config) -> vectors.Data:
    store = CorpusStore.open(path, read_only=True)
    try:
        every = np.stack([one.vector for one in store.entries_of(store.ids())])
    finally:
        store.close()
    queries = min(config.queries, len(every) // 5)
    return vectors.from_vectors(config.work_dir / "corpus", every, queries)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
