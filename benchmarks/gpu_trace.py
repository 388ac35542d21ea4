"""Where the device's time goes: a profiler trace, added up by what the kernels do."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.markdown import table

# The first that matches a kernel's (or a CPU thunk's) name says what it is.
KINDS = (
    (
        "products",
        r"gemm|gemv|ynn_fusion|cublas|cutlass|nvjet|dot|matmul|wgmma|sm90_xmma|convolution",
    ),
    ("copies", r"memcpy|copy|dynamic.update.slice|dynamic.slice|gather|scatter|concatenate|memset"),
    ("reductions, softmax, norms", r"reduce|softmax|norm"),
    ("other fusions", r"fusion|loop_|input_|wrapped|triton"),
)
# A CPU's trace also has what encloses and what ends its thunks.
ENCLOSING = r"ThunkExecutor|end: |while"
TOP = 12


def summarise(run: Callable[[], Any]) -> dict[str, Any]:
    """Runs something under the profiler (once before, so that it is warm).

    Returns {"wall_s", "busy_s", "idle_share", "kinds": {kind: share of busy}, "top": [[name,
    share of busy, times]]}. Busy is the time in which any kernel ran, on the busiest stream.
    """
    run()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # our own lines would be most of the file
    with tempfile.TemporaryDirectory(prefix="tte-trace-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            began = time.perf_counter()
            run()
            wall = time.perf_counter() - began
        files = list(Path(folder).rglob("*.xplane.pb"))
        lines = list(_lines(files[0])) if files else []
    if not lines:
        return {"wall_s": wall, "busy_s": 0.0, "idle_share": 1.0, "kinds": {}, "top": []}
    return add_up(lines, wall)


def add_up(lines: Iterable[list[tuple[str, float, float]]], wall_s: float) -> dict[str, Any]:
    """The summary of streams of (kernel, start, seconds); see `summarise`."""
    names: defaultdict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    busy = 0.0
    for line in lines:
        busy = max(busy, _union(line))
        for name, _, seconds in line:
            names[name] += seconds
            times[name] += 1
    total = sum(names.values()) or 1.0
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, seconds in names.items():
        kinds[kind(name)] += seconds / total
    return {
        "wall_s": round(wall_s, 4),
        "busy_s": round(busy, 4),
        "idle_share": round(max(1 - busy / wall_s, 0.0), 3),
        "kinds": {name: round(share, 3) for name, share in _largest(kinds)},
        "top": [[n, round(s / total, 3), times[n]] for n, s in _largest(names)[:TOP]],
    }


def _largest(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


def kind(name: str) -> str:
    """What a kernel does, by its name."""
    return next((k for k, pattern in KINDS if re.search(pattern, name, re.I)), "else")


def text(summary: Mapping[str, Any]) -> str:
    """The summary as tables."""
    shares = [[name, f"{100 * share:.0f} %"] for name, share in summary["kinds"].items()]
    top = [[name[:70], f"{100 * share:.0f} %", str(n)] for name, share, n in summary["top"]]
    idle = f"\nidle between kernels: {100 * summary['idle_share']:.0f} % of {summary['wall_s']} s\n"
    return idle + table(["kind", "of busy time"], shares) + table(["kernel", "share", "times"], top)


def _lines(file: Path) -> Iterable[list[tuple[str, float, float]]]:
    """Streams of the accelerators; without any, the threads on which a CPU runs its programs."""
    planes = list(ProfileData.from_file(str(file)).planes)
    chosen = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
    wanted = r"stream|XLA Ops" if chosen else r"XLAPjRtCpu|xla-cpu|XLAEigen|tf_|PjRt"
    for plane in chosen or [p for p in planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            if re.search(wanted, line.name, re.I):
                events = [
                    (e.name, e.start_ns * 1e-9, e.duration_ns * 1e-9)
                    for e in line.events
                    if not re.match(ENCLOSING, e.name)
                ]
                if events:
                    yield events


def _union(events: list[tuple[str, float, float]]) -> float:
    """Seconds in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for _, start, seconds in sorted(events, key=lambda event: event[1]):
        stop = start + seconds
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
