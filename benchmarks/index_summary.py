"""The two tables that `benchmarks.index` ends in: every contender's figures, and the goals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import GRAPHS, LIBRARY

KS = (10, 100)
RECALL = 0.95
GOALS = ("what", "figure", "goal", "")
SPEEDS = (
    "vectors",
    "index",
    "build, s",
    "memory, MB",
    *(f"QPS, {mode}, recall@{k} = {RECALL}" for k in KS for mode in ("batch", "single")),
)
_SCAN = "faiss ivf-pq fast-scan"


def speeds(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of `SPEEDS`; "-" where no parameter reaches the recall."""
    rows: list[tuple[str, ...]] = []
    for part in content.get("sets", {}).values():
        for name, found in part.items():
            if "error" in found:
                rows.append((f"{found['rows']:,}", name, "failed", *["-"] * (1 + 2 * len(KS))))
                continue
            build = (f"{found['build']['build_s']:.1f}", f"{found['build']['memory_mb']:.0f}")
            for shown in (name, LIBRARY) if name == "ours" else (name,):
                best = [
                    best_qps(found["points"], shown, mode, k)
                    for k in KS
                    for mode in ("batch", "single")
                ]
                figures = ("-" if qps is None else f"{qps:,.0f}" for qps in best)
                rows.append((f"{found['rows']:,}", shown, *build, *figures))
    served = content.get("served", {}).get("searches")
    if served:
        for way in ("grpc", "in_process"):
            best = [
                at_recall([(p["recall"], p[mode]) for p in served[way] if p["k"] == k])
                for k in KS
                for mode in ("batch32_qps", "single_qps")
            ]
            figures = ("-" if qps is None else f"{qps:,.0f}" for qps in best)
            name = f"ours, {'through gRPC' if way == 'grpc' else 'in process'}, batches of 32"
            rows.append((f"{served['documents']:,}", name, "-", "-", *figures))
    return rows


def goals(content: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (what, figure, goal, ok or miss); "-" where it was not measured."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, figure: float | None, goal: float, *, least: bool = True, unit: str = ""):
        sign = "≥" if least else "<"
        wanted = f"{sign} {goal:g}{unit}"
        if figure is None:
            rows.append((what, "-", wanted, "miss"))
            return
        good = figure >= goal if least else figure < goal
        rows.append((what, f"{figure:.4g}{unit}", wanted, "ok" if good else "miss"))

    for name, part in content.get("sets", {}).items():
        points = [p for found in part.values() for p in found.get("points", ())]
        where = "the corpus's own vectors" if name == "corpus" else f"{int(name):,} vectors"
        for mode, goal in (("batch", 2.0), ("single", 1.0)):
            ours = best_qps(points, "ours", mode)
            graph = max(filter(None, (best_qps(points, g, mode) for g in GRAPHS)), default=None)
            ratio = ours / graph if ours and graph else None
            add(f"{where}, {mode}: QPS against the best graph index", ratio, goal, unit=" x")
        ours, scan = best_qps(points, "ours", "batch"), best_qps(points, _SCAN, "batch")
        add(f"{where}, batch: QPS against FAISS IVF-PQ fast-scan",
            ours / scan if ours and scan else None, 1.0, unit=" x")  # fmt: skip
    served = content.get("served", {})
    searches, start = served.get("searches"), served.get("start")
    add("through gRPC against in process, batches of 32",
        searches and searches["chosen"]["grpc"] / searches["chosen"]["in_process"],
        0.8, unit=" x")  # fmt: skip
    add("recall@10 through gRPC at the effort that the service chose",
        searches and searches["chosen"]["recall"], RECALL)  # fmt: skip
    upserts = content.get("upserts")
    add("durable upserts a second, batches of 100", upserts and upserts["per_second"], 2000)
    documents = f"{start['documents']:,}" if start else "the"
    add(f"start of the service with {documents} documents",
        start and max(start["seconds"]), 20, least=False, unit=" s")  # fmt: skip
    return rows


def best_qps(
    points: Sequence[dict[str, Any]], contender: str, mode: str, k: int = 10
) -> float | None:
    """Queries a second at a recall of `RECALL`; None when no parameter reaches it.

    Between the two measured points around it, the logarithm is taken as linear in recall: an index
    with a coarse parameter must not lose, or win, by where its points happen to lie.
    """
    mine = [p for p in points if (p["contender"], p["mode"], p["k"]) == (contender, mode, k)]
    return at_recall([(p["recall"], p["qps"]) for p in mine])


def at_recall(curve: Sequence[tuple[float, float]], recall: float = RECALL) -> float | None:
    """`best_qps` of (recall, queries a second) points."""
    above = [point for point in curve if point[0] >= recall]
    below = [point for point in curve if point[0] < recall]
    if not above:
        return None
    right = max(above, key=lambda point: point[1])
    faster = [point for point in below if point[1] > right[1]]
    if not faster:
        return right[1]
    left = max(faster)
    share = (recall - left[0]) / (right[0] - left[0])
    return math.exp((1 - share) * math.log(left[1]) + share * math.log(right[1]))
