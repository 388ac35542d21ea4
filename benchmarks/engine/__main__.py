"""Runs the comparisons and prints what, figure, goal, ok or miss.

    python -m benchmarks.engine                      what is not measured yet, of both models
    python -m benchmarks.engine --parts rerank serve --sizes random    only some
    python -m benchmarks.engine --again              measure again what is there
    python -m benchmarks.engine --quick --out /tmp/quick.json   few of everything: does it run?

Both sides have the same weights, token ids and threads, in float32; contenders take turns. JAX and
PyTorch run a dense product equally fast here, so the gains come from less padding, from sharing,
and from not waiting.

Every part is written when it is done, with its own date, commit, minutes, and how idle the machine
was; a later run goes on with what is missing or was measured on a busy machine. Random models and
compiled programs are kept in the data directory, so that only a first run waits for them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import environment
from benchmarks.engine import embedding, generation, limits, models, reference, reranking, serving
from benchmarks.engine.summary import summary
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.engine.executables import enable_compile_cache

Part = Literal["embed", "rerank", "generate", "serve", "start", "limits"]
PARTS: tuple[Part, ...] = ("embed", "rerank", "generate", "serve", "start", "limits")
Size = Literal["random", "builtin"]


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      parts: what is measured.
      sizes: the random models of 110 million parameters, the built-in ones, or both.
      again: measure also what `out` has.
      rounds: in which contenders take turns, after one that is not counted.
      inputs: that are embedded.
      candidates: of one query.
      requests: generated at once.
      clients, calls: of the mixed load.
      quick: few of everything and one round.
      data_dir: random models and compiled programs; made when missing.
      out: the result.
    """

    parts: tuple[Part, ...] = PARTS
    sizes: tuple[Size, ...] = ("random", "builtin")
    again: bool = False
    rounds: int = 5
    inputs: int = 256
    candidates: int = 50
    requests: int = 16
    clients: int = 32
    calls: int = 192
    quick: bool = False
    data_dir: Path = Path(".tte/bench-engine")
    out: Path = Path("benchmarks/results/engine.json")


def main(config: Config) -> int:
    reference.use_threads(len(os.sched_getaffinity(0)))
    config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    enable_compile_cache(config.data_dir / "compiled")
    sizes: dict[str, Any] = {}
    if config.out.is_file():
        sizes = json.loads(config.out.read_text())["sizes"]
    for size in config.sizes:
        vl, text, runs = _runs(size, config)
        figures = sizes.setdefault(
            size, {"parameters": {m.name: models.parameters(m) for m in (vl, text)}}
        )
        for name, run in runs.items():
            if name.split()[0] not in config.parts:
                continue
            if name in figures and not figures[name]["about"]["noisy"] and not config.again:
                print(f"{size}: {name}: measured on {figures[name]['about']['date']}", flush=True)
                continue
            print(f"{size}: {name} …", flush=True)
            about = environment.describe("benchmarks.engine")
            before, began = environment.foreign_load(), time.perf_counter()
            measured = run()
            minutes = round((time.perf_counter() - began) / 60, 1)
            after = environment.foreign_load()
            about |= {
                "foreign_load": {"before": before, "after": after},
                "noisy": environment.noisy(before, after),
                "minutes": minutes,
            }
            figures[name] = measured | {"about": about}
            for one in measured["rows"]:
                print(f"  {one}", flush=True)
            noise = ", noisy: other work ran beside it" if about["noisy"] else ""
            print(f"  {minutes} minutes{noise}", flush=True)
            _write(config.out, {"sizes": sizes})
    print(summary({"sizes": sizes}))
    print(f"Wrote {config.out}.")
    return 0


def _runs(size: Size, config: Config) -> tuple[Path, Path, dict[str, Callable[[], dict[str, Any]]]]:
    """Both models of a size, and what measures each part on them."""
    few = config.quick
    rounds = 1 if few else config.rounds
    vl, text, largest = WEIGHTS_DIR / REASONER, WEIGHTS_DIR / RERANKER, 112
    shapes = ((48, 32),)
    if size == "random":
        vl = models.write_vl(config.data_dir / "random-vl")
        text = models.write_text(config.data_dir / "random-text")
        largest, shapes = models.LARGEST, ((512, 64), (400, 100))
    return (
        vl,
        text,
        {
            "embed": lambda: embedding.compare(
                vl, count=24 if few else config.inputs, rounds=rounds, largest=largest
            ),
            **{
                f"rerank {p}/{s}": lambda p=p, s=s: reranking.compare(
                    text,
                    candidates=10 if few else config.candidates,
                    prefix=p,
                    suffix=s,
                    rounds=rounds,
                )
                for p, s in shapes
            },
            "generate": lambda: generation.compare(
                vl, requests=4 if few else config.requests, rounds=rounds
            ),
            "serve": lambda: asyncio.run(
                serving.load(
                    {"reasoner": vl, "embedder": vl, "reranker": text},
                    clients=config.clients,
                    requests=24 if few else config.calls,
                    rounds=rounds,
                    largest=largest,
                    compiled=config.data_dir / "compiled",
                )
            ),
            "start": lambda: serving.starts(vl),
            "limits": lambda: limits.measure(vl, rounds=3 if few else 15),
        },
    )


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
