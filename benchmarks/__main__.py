"""`python -m benchmarks [NAME …] [--list]`: runs the benchmarks, then fills the tables of the docs.

Each benchmark is also a module of its own with options (`python -m benchmarks.search --help`) and
writes one file under `benchmarks/results/`. Without a name all run, with their default options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "search": "latency by stage, warm, with one client and with four",
    "unified": "embedding in the reasoner's slots against a call of the embedder",
    "engine": "the engine against PyTorch, its own services and the machine's limits",
    "load": "peak of the host's memory while weights are loaded, against the weights",
    "quantisation": "int8 weights: embeddings, speed and memory against float32",
    "startup": "seconds from `tte serve` to the first answer, first start and second start",
}
# These need the training data set, which only a trainer's machine has, PyTorch, which only a
# developer's has, or a network; so they are not run from here.
ELSEWHERE = {
    "training.builtin.evaluate": "held-out figures of the built-in models (needs .data/emoji)",
    "benchmarks.experiments": "the papers' claims in small: docs/results.md (needs .data/emoji)",
    "benchmarks.builtin_training": "the built-in models from nothing, three hours (.data/emoji)",
    "benchmarks.rounds": "rounds of mined negatives of the built-in models (needs .data/emoji)",
    "benchmarks.mini": "mini-MMEB, every task, with the built-in models (downloads 190 MB once)",
    "benchmarks.gpu": "the engine on an accelerator (needs one, or --tiny)",
    "benchmarks.soak": "hours of use in minutes: is memory flat?",
    "benchmarks.training": "steps of contrastive training against a PyTorch loop (needs torch)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the first benchmark that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=listing())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; default: all")
    parser.add_argument("--list", action="store_true", help="only list them")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(listing(), flush=True)
    if options.list:
        return 0
    for name in options.names or BENCHMARKS:
        print(f"\n=== {name}", flush=True)
        # A process each: what one has imported or started cannot disturb the next.
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode
        if code:
            return code
    return subprocess.run([sys.executable, "-m", "benchmarks.tables"]).returncode


def listing() -> str:
    rows = {f"benchmarks.{name}": what for name, what in BENCHMARKS.items()} | ELSEWHERE
    width = max(map(len, rows))
    return "\n".join(f"python -m {name:{width}}  {what}" for name, what in rows.items())


if __name__ == "__main__":
    sys.exit(main())
