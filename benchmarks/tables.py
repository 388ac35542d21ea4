"""Fills the tables of the documentation from measured results and from the code, never by hand.

    python -m benchmarks.tables            rewrite the pages
    python -m benchmarks.tables --check    exit code 1 when a page is not what would be written

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. Where its result file does not
exist yet, a line says which command makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    code_tables,
    experiment_tables,
    index_summary,
    model_tables,
    quality_tables,
    soak,
    training_tables,
)
from benchmarks.engine.summary import summary
from benchmarks.environment import ROOT
from benchmarks.experiments import figures as drawings
from benchmarks.markdown import table

PAGES = (
    "README.md",
    "docs/builtin_models.md",
    "docs/evaluation.md",
    "docs/operations.md",
    "docs/real_weights.md",
    "docs/results.md",
)
_SECTION = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """A table of a result file: its name under `benchmarks/results/`, the command that makes it,
    and what turns it into Markdown."""

    file: str
    command: str
    render: Callable[[Mapping[str, Any]], str]


def latency(result: Mapping[str, Any]) -> str:
    """One client: p50 / p95 of each kind of query, then p50 by stage."""
    kinds = result["clients"]["1"]["kinds"]
    stages = list(dict.fromkeys(s for k in kinds.values() for s in k["stages"]))
    rows = []
    for kind, figures in kinds.items():
        times = [_pair(figures[name]) for name in ("first_ranking", "final")]
        used = figures["stages"]
        walls = [_wall(used[s]) if s in used else "–" for s in stages]
        tokens = used.get("reason", {}).get("tokens_out", 0)
        rows.append([kind, *times, *walls, f"{tokens:.0f}"])
    head = ["query", "first ranking, p50 / p95 ms", "final, p50 / p95 ms",
            *(f"{s}, p50 ms" for s in stages), "tokens reasoned"]  # fmt: skip
    return table(head, rows) + _footnote(result)


def _wall(stage: Mapping[str, Any]) -> str:
    """p50 in ms; of a stage whose work another one did for most queries, which one."""
    if not stage["wall"]["p50_ms"] and (within := stage.get("within")):
        return f"in {max(within, key=within.get)}"
    return f"{stage['wall']['p50_ms']:.0f}"


def load(result: Mapping[str, Any]) -> str:
    """Closed loop: how throughput and latency go with the number of clients."""
    rows = []
    for clients, figures in result["clients"].items():
        everything = figures["all"]
        times = [_pair(everything[name]) for name in ("first_ranking", "final")]
        queries = everything["queries"]
        rows.append([clients, f"{figures['queries_per_s']:.1f}", *times, str(queries)])
    head = ["clients", "queries/s", "first ranking, p50 / p95 ms", "final, p50 / p95 ms", "queries"]
    during = sum(result["compile_counts"]["during"].values())
    return table(head, rows) + f"\nPrograms compiled while serving these: {during}.\n"


def startup(result: Mapping[str, Any]) -> str:
    """Both starts in seconds."""
    rows = [
        [name, *(f"{result[name][key]:.1f}" for key in ("serving_s", "corpus_s", "first_answer_s"))]
        for name in ("first", "second")
    ]
    head = ["start", "all SERVING, s", f"{result['documents']:,} documents searchable, s",
            "first query answered, s"]  # fmt: skip
    return table(head, rows) + _footnote(result)


def engine(result: Mapping[str, Any]) -> str:
    """What, goal, and the figure of each size of model with its verdict."""
    parts = {
        f"{size} {name}": part["about"]
        for size, figures in result["sizes"].items()
        for name, part in figures.items()
        if "about" in part
    }
    newest = max(parts.values(), key=lambda about: about["date"])
    commits = ", ".join(dict.fromkeys(about["commit"] for about in parts.values()))
    busy = [name for name, about in parts.items() if about["noisy"]]
    noisy = f" **Other work ran on the machine beside: {', '.join(busy)}.**" if busy else ""
    machine = newest["machine"]
    return summary(dict(result)) + (
        f"\n`python -m benchmarks.engine`, until {newest['date']}, commits {commits}, "
        f"{machine['cores']} cores ({machine['cpu']}), jax {newest['versions']['jax']}.{noisy}\n"
    )


def index(result: Mapping[str, Any]) -> str:
    """What every index does at enough recall, then the goals."""
    speeds = table(index_summary.SPEEDS, result["speeds"])
    return speeds + table(index_summary.GOALS, result["table"]) + _footnote(result)


def loading(result: Mapping[str, Any]) -> str:
    """Peak of the host's memory by dtype of the parameters."""
    rows = [
        [
            f"{result['file_dtype']} → {dtype}",
            f"{figures['weights_bytes'] / 1e9:.2f}",
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{figures['ratio']:.2f}",
            f"{figures['seconds']:.1f}",
        ]
        for dtype, figures in result["loads"].items()
    ]
    head = ["file → memory", "weights, GB", "peak, GB", "peak / weights", "seconds"]
    return table(head, rows) + _footnote(result)


def quantisation(result: Mapping[str, Any]) -> str:
    """int8 weights against float32, by model; times as ratios, which other work disturbs less."""
    rows = []
    for name, figures in result["models"].items():
        cosines = [f"{c['mean']:.5f} / {c['least']:.5f}" for c in figures["cosine"].values()]
        size = figures["bytes"]
        memory = f"{size['float32'] / 1e6:.0f} → {size['int8'] / 1e6:.0f}"
        speed = [f"{ratio:.2f}" for ratio in figures["speed_ratio"].values()]
        rows.append([name, "; ".join(cosines), memory, *speed])
    shapes = next(iter(result["models"].values()))["speed_ratio"]
    head = ["model", "cosine of embeddings, mean / least", "weights, MB",
            *(f"{shape}, times as fast" for shape in shapes)]  # fmt: skip
    return table(head, rows) + _footnote(result)


def parity(result: Mapping[str, Any]) -> str:
    """Largest deviation of fp32 logits from the reference, family by case."""
    found, limit = result["largest_deviation_of_logits"], result["limit"]
    cases = list(next(iter(found.values())))
    rows = [[f"`{family}`", *(_deviation(row[case], limit) for case in cases)]
            for family, row in found.items()]  # fmt: skip
    about = result["versions"]
    return table(["family", *cases], rows) + (
        f"\n`{result['command']}`, {result['date']}, commit {result['commit']}, against"
        f" transformers {about['transformers']} with torch {result['reference']['torch']};"
        f" limit {limit:g}.\n"
    )


def memory(result: Mapping[str, Any]) -> str:
    """Each process's memory under hours of use, and whether it is flat."""
    return (
        soak.summary(dict(result))
        + (f"\n{result['requests']:,} requests in {result['seconds']:.0f} s.")
        + _footnote(result)
    )


MEASURED = {
    "parity": Measured("parity.json", "make parity", parity),
    "latency": Measured("search.json", "python -m benchmarks.search", latency),
    "load": Measured("search.json", "python -m benchmarks.search", load),
    "engine": Measured("engine.json", "make bench-engine", engine),
    "soak": Measured("soak.json", "python -m benchmarks.soak --minutes 0", memory),
    "index": Measured("index.json", "make bench-index", index),
    "loading": Measured("load.json", "python -m benchmarks.load", loading),
    "startup": Measured("startup.json", "python -m benchmarks.startup", startup),
    "quantisation": Measured(
        "quantisation.json", "python -m benchmarks.quantisation", quantisation
    ),
    "quality-summary": Measured(
        "builtin_quality.json", "python -m training.builtin.evaluate", quality_tables.summary
    ),
    "quality": Measured(
        "builtin_quality.json", "python -m training.builtin.evaluate", quality_tables.full
    ),
    **{
        f"experiments-{name}": Measured("experiments.json", "make experiments", render)
        for name, render in (
            ("summary", experiment_tables.summary),
            ("budget", experiment_tables.budget),
            ("ablation", experiment_tables.ablation),
            ("strength", experiment_tables.strength),
        )
    },
    "mini-mmeb": Measured("mini_mmeb.json", "python -m benchmarks.mini", quality_tables.mini_mmeb),
    "rounds": Measured("rounds.json", "python -m benchmarks.rounds", training_tables.rounds),
    "arms": Measured("arms.json", "python -m benchmarks.arms", training_tables.arms),
    "false_negatives": Measured(
        "false_negatives.json",
        "python -m benchmarks.false_negatives",
        training_tables.false_negatives,
    ),
    "builtin_training": Measured(
        "builtin_training.json",
        "python -m benchmarks.builtin_training",
        training_tables.builtin_training,
    ),
    "gradcache": Measured(
        "gradcache.json", "python -m benchmarks.gradcache", training_tables.gradcache
    ),
    "training": Measured(
        "training.json", "python -m benchmarks.training", training_tables.training
    ),
    "loop_kills": Measured(
        "loop_kills.json", "python -m benchmarks.loop_kills", training_tables.loop_kills
    ),
}
FROM_CODE: Mapping[str, Callable[[], str]] = {
    "held-out": quality_tables.held_out,
    "models": model_tables.models,
    "settings": code_tables.settings,
    "ports": code_tables.ports,
    "limits": code_tables.limits_,
    "errors": code_tables.errors_,
    "exit-codes": code_tables.exit_codes,
}


def render(name: str, results: Path) -> str:
    """The Markdown of one table. Raises KeyError for a name that is none."""
    if name in FROM_CODE:
        return FROM_CODE[name]()
    measured = MEASURED[name]
    path = results / measured.file
    if not path.is_file():
        return f"*Not measured yet: `{measured.command}` makes this table.*\n"
    return measured.render(json.loads(path.read_text()))


def filled(page: str, results: Path) -> str:
    """The page with every table as it should be.

    Raises ValueError for a table of an unknown name and for a marker without its end.
    """
    starts, ends = page.count("<!-- table:"), page.count("<!-- /table -->")
    if not len(_SECTION.findall(page)) == starts == ends:
        raise ValueError(
            f"{starts} `<!-- table:NAME -->` but {ends} `<!-- /table -->` of their own"
        )

    def replace(match: re.Match[str]) -> str:
        try:
            return match[1] + render(match[2], results) + match[3]
        except KeyError as error:
            if match[2] in MEASURED:
                raise ValueError(f"{MEASURED[match[2]].file} lacks {error}") from error
            known = ", ".join((*MEASURED, *FROM_CODE))
            raise ValueError(f"no table is called {match[2]!r}; there are {known}") from None

    return _SECTION.sub(replace, page)


def stale(root: Path = ROOT, pages: Iterable[str] = PAGES) -> dict[Path, str]:
    """Page → what it should hold, of the pages that hold something else."""
    results = root / "benchmarks/results"
    wanted = {root / name: filled((root / name).read_text(), results) for name in pages}
    return {path: text for path, text in wanted.items() if path.read_text() != text}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    check = parser.parse_args(arguments).check
    found = stale()
    for path, text in found.items():
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'not as the results say' if check else 'rewritten'}")
    shown = drawings.shown(ROOT / "benchmarks/results")
    old = drawings.stale(shown, ROOT / drawings.FOLDER)
    for name in old if check else drawings.write(shown, ROOT / drawings.FOLDER):
        print(f"{name}: {'not as the result says' if check else 'drawn'}")
    return 1 if check and (found or old) else 0


def _pair(spread: Mapping[str, float]) -> str:
    return f"{spread['p50_ms']:.0f} / {spread['p95_ms']:.0f}"


def _deviation(value: float | None, limit: float) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if value <= limit else f"**{value:.1e}**"


def _footnote(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    noisy = " **Other work ran on the machine meanwhile.**" if result["noisy"] else ""
    return (
        f"\n`{result['command']}`, {result['date']}, commit {result['commit']}, {machine['cores']} "
        f"cores ({machine['cpu']}), jax {result['versions']['jax']}.{noisy}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
