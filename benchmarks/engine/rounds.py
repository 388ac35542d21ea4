"""Contenders that take turns, and what comes of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that is not counted.

    They take turns, so that what else the machine does meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """{"median_s", "best_s"}."""
    return {"median_s": round(statistics.median(seconds), 4), "best_s": round(min(seconds), 4)}


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of how many times longer `slow` took in the same round."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def row(what: str, figure: float, goal: float, unit: str, *, most: bool = False) -> dict[str, Any]:
    """One line of the table; `most`: the goal is an upper bound."""
    met = figure <= goal if most else figure >= goal
    return {
        "what": what,
        "figure": figure,
        "goal": f"{'≤' if most else '≥'} {goal:g}{unit}",
        "verdict": "ok" if met else "miss",
    }
