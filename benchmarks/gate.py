"""The regression gate: mini-MMEB with the built-in models against the committed results.

    python -m benchmarks.gate             # exit code 1 when an arm is significantly worse
    python -m benchmarks.gate --update    # replaces the committed results, after new weights

Every arm is compared query by query; worse means that the whole 95 % interval of the mean
difference over the tasks is below zero, or that a task is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tte_jax.evaluation import report
from tte_jax.evaluation.report import Comparison

BASELINE = Path(__file__).parent / "baseline" / "mini-mmeb"
# Above chance with the built-in models, and made of what is installed: a task at chance would only
# widen the interval.
TASKS = (
    "mini-classification",
    "mini-t2i",
    "mini-i2i",
    "mini-composed",
    "mini-grounding",
    "mini-v2t",
)
QUERIES = 40
ARMS = ["--ecr", "none,full", "--budgets", "64", "--rerank", "off,ecrr", "--depths", "10"]
KEPT = 10
"""Of each ranking, in the committed files: more than the metric looks at."""


def run(out: Path, data: Path) -> None:
    """Builds the tasks and runs all arms with the built-in models."""
    command = [
        sys.executable, "-m", "tte_jax.cli.app", "eval", "mini", "--tasks", ",".join(TASKS),
        "--queries", str(QUERIES), *ARMS, "--data", str(data), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def keep(results: Path, baseline: Path) -> None:
    """The rankings' heads, scores and what was run, without pictures and timings."""
    shutil.rmtree(baseline, ignore_errors=True)
    for path in sorted(results.rglob("*_pred.jsonl")):
        place = baseline / path.parent.relative_to(results)
        place.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            row["prediction"] = row["prediction"][:KEPT]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (place / path.name).write_text("\n".join(lines) + "\n", "utf-8")
        stem = path.name.removesuffix("_pred.jsonl")
        shutil.copy(path.with_name(f"{stem}_score.json"), place)
        about = json.loads(path.with_name(f"{stem}_info.json").read_text("utf-8"))
        kept = {k: about[k] for k in ("metric", "modality", "score", "settings") if k in about}
        (place / f"{stem}_info.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


def compared(baseline: Path, results: Path) -> dict[str, Comparison]:
    """By arm. Raises NotFoundError where an arm or all of its tasks are missing."""
    found = {}
    for arm in sorted(baseline.iterdir()):
        (before,) = report.find_runs([arm])
        (now,) = report.find_runs([results / arm.name])
        found[arm.name] = report.compare_runs(before, now)
    return found


def worse(found: Comparison) -> bool:
    return found.overall.high < 0 or bool(found.only_a)


def table(found: dict[str, Comparison], results: Path) -> list[dict[str, Any]]:
    rows = []
    for arm, comparison in found.items():
        (now,) = report.find_runs([results / arm])
        rows.append(
            {
                "arm": arm,
                "score": sum(t.score for t in now.tasks.values()) / len(now.tasks),
                "difference": comparison.overall.mean,
                "low": comparison.overall.low,
                "high": comparison.overall.high,
                "ok": not worse(comparison),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--update", action="store_true", help="replace the committed results")
    parser.add_argument("--data", type=Path, default=Path(".tte/mini-mmeb-gate"))
    parser.add_argument("--results", type=Path, help="of a run that was made before")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = args.results or Path(scratch)
        if args.results is None:
            run(results, args.data)
        if args.update:
            keep(results, BASELINE)
            print(f"kept in {BASELINE}")
            return 0
        rows = table(compared(BASELINE, results), results)
    for row in rows:
        print(
            f"{row['arm']}: hit@1 {100 * row['score']:.1f}, {100 * row['difference']:+.1f} "
            f"({100 * row['low']:+.1f} to {100 * row['high']:+.1f}): "
            f"{'ok' if row['ok'] else 'WORSE'}"
        )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
