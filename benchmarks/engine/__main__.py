"""Runs the comparisons and prints what, figure, goal, ok or miss.

    python -m benchmarks.engine                      both models, about half an hour on two cores
    python -m benchmarks.engine --parts rerank hop   only some
    python -m benchmarks.engine --quick              few inputs and one round: does it run?

Both sides have the same weights, token ids and threads, in float32; contenders take turns. JAX and
PyTorch run a dense product equally fast here, so the gains come from less padding, from sharing,
and from not waiting. What has been measured is written after each part.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
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
      rounds: in which contenders take turns, after one that is not counted.
      inputs: that are embedded.
      candidates: of one query.
      requests: generated at once.
      clients, calls: of the mixed load.
      quick: few of everything and one round.
      out: the result.
    """

    parts: tuple[Part, ...] = PARTS
    sizes: tuple[Size, ...] = ("random", "builtin")
    rounds: int = 5
    inputs: int = 256
    candidates: int = 50
    requests: int = 16
    clients: int = 32
    calls: int = 192
    quick: bool = False
    out: Path = Path("benchmarks/results/engine.json")


def main(config: Config) -> int:
    few = config.quick
    rounds = 1 if few else config.rounds
    reference.use_threads(len(os.sched_getaffinity(0)))
    before = environment.foreign_load()
    result: dict[str, Any] = environment.describe("benchmarks.engine") | {
        "foreign_load": {"before": before},
        "noisy": environment.noisy(before),
        "sizes": {},
    }
    with tempfile.TemporaryDirectory(prefix="tte-engine-") as made:
        enable_compile_cache(Path(made) / "compiled")
        for size in config.sizes:
            vl, text, largest = WEIGHTS_DIR / REASONER, WEIGHTS_DIR / RERANKER, 112
            shapes = ((48, 32),)
            if size == "random":
                vl = models.write_vl(Path(made) / "random-vl")
                text = models.write_text(Path(made) / "random-text")
                largest, shapes = models.LARGEST, ((512, 64), (400, 100))
            figures = result["sizes"].setdefault(
                size, {"parameters": {m.name: models.parameters(m) for m in (vl, text)}}
            )
            runs: dict[str, Callable[[], dict[str, Any]]] = {
                "embed": lambda vl=vl, largest=largest: embedding.compare(
                    vl, count=24 if few else config.inputs, rounds=rounds, largest=largest
                ),
                **{
                    f"rerank {p}/{s}": lambda text=text, p=p, s=s: reranking.compare(
                        text,
                        candidates=10 if few else config.candidates,
                        prefix=p,
                        suffix=s,
                        rounds=rounds,
                    )
                    for p, s in shapes
                },
                "generate": lambda vl=vl: generation.compare(
                    vl, requests=4 if few else config.requests, rounds=rounds
                ),
                "serve": lambda vl=vl, text=text, largest=largest: asyncio.run(
                    serving.load(
                        {"reasoner": vl, "embedder": vl, "reranker": text},
                        clients=config.clients,
                        requests=24 if few else config.calls,
                        rounds=rounds,
                        largest=largest,
                    )
                ),
                "start": lambda vl=vl: serving.starts(vl),
                "limits": lambda vl=vl: limits.measure(vl, rounds=3 if few else 15),
            }
            for name, run in runs.items():
                if name.split()[0] not in config.parts:
                    continue
                began = time.perf_counter()
                print(f"{size}: {name} …", flush=True)
                figures[name] = run()
                for one in figures[name]["rows"]:
                    print(f"  {one}", flush=True)
                print(f"  {time.perf_counter() - began:.0f} s", flush=True)
                _write(config.out, result)
    after = environment.foreign_load()
    result["foreign_load"]["after"] = after
    result["noisy"] = environment.noisy(before, after)
    _write(config.out, result)
    print(summary(result))
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    return 0


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
