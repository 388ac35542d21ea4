"""Latency of warm searches through the gateway: by kind of query and stage, one client and four.

    python -m benchmarks.search

Starts the services as `tte demo` does, with the demo's data directory, so that the built-in corpus
is ingested only once; `--address` measures a system that runs already. Each client sends its next
query when the last one is answered (closed loop), and no query is sent twice.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import environment
from benchmarks.queries import KINDS, Question, draw
from tte_jax.cascade.messages import SearchQuery, SearchStage, SearchUpdate
from tte_jax.cli import connection, inspection, launch, state
from tte_jax.cli.output import Output
from tte_jax.client import Client
from tte_jax.content import Budget
from tte_jax.errors import UnavailableError


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      address: gateway of a running system, host:port; empty = start one.
      queries: how many queries are measured at each number of clients, the kinds taking turns.
      clients: numbers of clients, one measurement each.
      warm: queries sent before the first measurement and not counted.
      top_k: results asked for.
      timeout: deadline of a search in seconds.
      data_dir: corpus and caches of a system that is started here.
      models: role=DIR, as `tte serve --models`; empty = the built-in models.
      start_timeout: seconds that the services get to start.
      out: the result.
      seed: of the queries.
    """

    address: str = ""
    queries: int = 60
    clients: tuple[int, ...] = (1, 4)
    warm: int = 9
    top_k: int = 10
    timeout: float = 60.0
    data_dir: Path = Path(".tte/demo")
    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    start_timeout: float = 900.0
    out: Path = Path("benchmarks/results/search.json")
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One answered query: seconds to the first ranking and to the final one, and the latter."""

    kind: str
    first_s: float
    final_s: float
    last: SearchUpdate

    @property
    def whole(self) -> bool:
        """Whether every stage did its work: reranked, and nothing degraded."""
        return self.last.stage is SearchStage.RERANKED and not self.last.degraded


def ask(client: Client, question: Question, *, top_k: int, timeout_s: float) -> Sample:
    """Sends one query and times its messages."""
    query = SearchQuery(question.content, top_k=top_k, deadline_s=timeout_s)
    started = time.perf_counter()
    times: list[float] = []
    last: SearchUpdate | None = None
    for update in client.search(query):
        times.append(time.perf_counter() - started)
        last = update
    if last is None:
        raise UnavailableError("the gateway ended a search without an answer")
    return Sample(question.kind, times[0], times[-1], last)


def measure(
    address: str, questions: Sequence[Question], *, clients: int, top_k: int, timeout_s: float
) -> tuple[list[Sample], float]:
    """Samples of all questions, shared out among `clients` threads, and the seconds they took.

    Raises the first error that a client met, after all have ended.
    """
    left, guard = iter(questions), threading.Lock()
    samples: list[Sample] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Client(address) as client:
                while not errors:
                    with guard:
                        question = next(left, None)
                    if question is None:
                        return
                    sample = ask(client, question, top_k=top_k, timeout_s=timeout_s)
                    with guard:
                        samples.append(sample)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return samples, seconds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """{"p50_ms", "p95_ms", "mean_ms"}; quantiles interpolate between neighbours."""
    ms = np.asarray(seconds, float) * 1000
    p50, p95 = np.quantile(ms, (0.5, 0.95))
    figures = {"p50_ms": p50, "p95_ms": p95, "mean_ms": ms.mean()}
    return {name: round(float(value), 2) for name, value in figures.items()}


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures of one kind of query: times to the rankings, and each stage's times and tokens.

    A stage's wall time is what the gateway saw, transport included; queue and compute times are
    the stage's own. `within` counts the queries for which another stage did its work, by that one.
    """
    stages: dict[str, Any] = {}
    for name in dict.fromkeys(u.stage for s in samples for u in s.last.usage):
        used = [u for s in samples for u in s.last.usage if u.stage == name]
        stages[name] = {
            "wall": spread([u.wall_s for u in used]),
            "queue": spread([u.queue_s for u in used]),
            "compute": spread([u.compute_s for u in used]),
            "tokens_in": round(float(np.mean([u.tokens_in for u in used])), 1),
            "tokens_out": round(float(np.mean([u.tokens_out for u in used])), 1),
            "cached_tokens": round(float(np.mean([u.cached_tokens for u in used])), 1),
            "within": dict(Counter(u.within for u in used if u.within)),
        }
    return {
        "queries": len(samples),
        "not_whole": sum(not s.whole for s in samples),
        "first_ranking": spread([s.first_s for s in samples]),
        "final": spread([s.final_s for s in samples]),
        "stages": stages,
    }


def summarise_all(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """One measurement: all queries together, and each kind."""
    kinds = {kind: [s for s in samples if s.kind == kind] for kind in KINDS}
    return {
        "seconds": round(seconds, 2),
        "queries_per_s": round(len(samples) / seconds, 2),
        "all": summarise(samples),
        "kinds": {kind: summarise(own) for kind, own in kinds.items() if own},
    }


def compile_counts(addresses: dict[str, str]) -> dict[str, int]:
    """Service → programs compiled so far; only of the services that answer and have a model."""
    seen = inspection.look(addresses, timeout_s=10.0)
    return {s.service: s.about["compile_count"] for s in seen if "compile_count" in s.about}


def system_facts(addresses: dict[str, str]) -> dict[str, Any]:
    """Service → its own account of itself: models and shapes, documents and kind of search."""
    keep = ("model_name", "model_version", "architecture", "dtype", "device", "dimension",
            "max_sequence_tokens", "documents", "kind", "embedder_version")  # fmt: skip
    seen = inspection.look(addresses, timeout_s=10.0)
    return {s.service: {k: s.about[k] for k in keep if k in s.about} for s in seen if s.about}


@contextlib.contextmanager
def system(config: Config) -> Iterator[dict[str, str]]:
    """Service → host:port, of the running system or of one that lives as long as the block."""
    if config.address:
        address = connection.checked(config.address)
        # The stages are known only when this machine's own system is the one that is meant.
        running = dict(connection.addresses())
        if running.get("gateway") != address:
            running = state.running_addresses(config.data_dir.absolute())
        yield running if running.get("gateway") == address else {"gateway": address}
        return
    out, folder = Output(), config.data_dir.absolute()
    flags = ["--port=0", *launch.model_flags(config.models)]
    with launch.services(folder, wait_s=config.start_timeout, out=out, flags=flags) as started:
        with Client(started.address("gateway")) as client:
            launch.ensure_corpus(started, client, folder, out)
        yield started.addresses


def run(config: Config, addresses: dict[str, str]) -> dict[str, Any]:
    """Everything that the result holds except the environment."""
    gateway = addresses["gateway"]
    needed = config.warm + config.queries * len(config.clients)
    questions = draw(needed, seed=config.seed)

    def ask_all(chosen: Sequence[Question], clients: int) -> tuple[list[Sample], float]:
        return measure(
            gateway, chosen, clients=clients, top_k=config.top_k, timeout_s=config.timeout
        )

    ask_all(questions[: config.warm], 1)
    load_before = environment.foreign_load()
    compiled_before = compile_counts(addresses)
    loads: dict[str, Any] = {}
    at = config.warm
    for clients in config.clients:
        samples, seconds = ask_all(questions[at : at + config.queries], clients)
        at += config.queries
        loads[str(clients)] = summarise_all(samples, seconds)
        final = loads[str(clients)]["all"]["final"]
        print(f"{clients} clients: {loads[str(clients)]['queries_per_s']} queries/s, final {final}")
    compiled_after = compile_counts(addresses)
    load_after = environment.foreign_load()
    return {
        "noisy": environment.noisy(load_before, load_after),
        "foreign_load": {"before": load_before, "after": load_after},
        "system": system_facts(addresses),
        "budget": vars(Budget()),
        "top_k": config.top_k,
        "compile_counts": {
            "before": compiled_before,
            "after": compiled_after,
            "during": {k: compiled_after[k] - n for k, n in compiled_before.items()
                       if k in compiled_after},
        },
        "clients": loads,
    }  # fmt: skip


def main(config: Config) -> int:
    """Returns 1 when a stage did not do its work, or a program was compiled while serving."""
    about = environment.describe("benchmarks.search")
    with system(config) as addresses:
        result = about | run(config, addresses)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    if not result["compile_counts"]["before"]:
        print("Compile counts are unknown: only the gateway's address is.", file=sys.stderr)
    late = sum(result["compile_counts"]["during"].values())
    partial = sum(load["all"]["not_whole"] for load in result["clients"].values())
    if late:
        print(f"{late} programs were compiled while serving; expected none.", file=sys.stderr)
    if partial:
        print(f"{partial} searches were degraded or not reranked.", file=sys.stderr)
    return 1 if late or partial else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
