"""Hours of use in minutes: searches, ingest and deletes without a pause, and is memory flat?

    python -m benchmarks.soak --minutes 3
    python -m benchmarks.soak --minutes 0    as many requests as 8 hours at one a second bring

Starts the five services with the built-in models and loads them through the gateway: clients
search without a pause (text, picture, both; with and without rewrites), and one writer puts
documents in and takes them out again. The private memory of every process is read every second.
Texts are always new; pictures come from a pool, because the services keep what they made of a
picture up to a bound of their own, and a filling cache is no leak.

The verdict is a fit of the memory over the answered requests, after the first third, in which pools
and caches fill: the slope with its 95 % interval (Theil-Sen over means of twenty blocks), as growth
over 28,800 requests. `flat`: even the interval's upper end is below `LIMIT` of the memory;
`grows`: its lower end is not; else, and below `LEAST` requests, the run was too short to say.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import theilslopes

from benchmarks import environment
from benchmarks.markdown import table
from benchmarks.service_process import private_bytes
from benchmarks.traffic import WORDS, picture
from tte_jax import system_state
from tte_jax.cascade.messages import IngestOptions, SearchQuery
from tte_jax.cli import launch
from tte_jax.cli.output import Output
from tte_jax.client import Client
from tte_jax.content import Budget, Content, Document
from tte_jax.errors import OverloadedError, TteError, UnavailableError

EIGHT_HOURS = 28_800
LIMIT = 0.05
BLOCKS = 20
SETTLES = 1 / 3
LEAST = 3000  # fitted requests: by then the caches of a few hundred megabytes are full
POOL = 64
BATCH = 10


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      minutes: how long the load lasts; 0 = until `requests` are answered.
      requests: searches and written documents that end it; 0 = until `minutes` are over.
      clients: that search.
      data_dir: of the services; empty = a temporary one, with its compile cache kept.
      start_timeout: seconds that the services get to start.
      out: the result.
      seed: of the requests.
    """

    minutes: float = 3.0
    requests: int = EIGHT_HOURS
    clients: int = 4
    data_dir: str = ""
    start_timeout: float = 900.0
    out: Path = Path("benchmarks/results/soak.json")
    seed: int = 0


@dataclass
class Done:
    """What has been answered, by kind or error code; shared by all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, number: int = 1) -> None:
        with self.guard:
            self.counts[kind] += number

    @property
    def requests(self) -> int:
        with self.guard:
            return sum(self.counts.values())


@dataclass(frozen=True)
class Fit:
    """Memory of one process over requests.

    Attributes:
      slope, low, high: bytes for each request, and the 95 % interval.
      memory: bytes, the mean of the fitted part.
      requests: how many the fitted part has.
    """

    slope: float
    low: float
    high: float
    memory: float
    requests: float

    @property
    def verdict(self) -> str:
        bound = LIMIT * self.memory / EIGHT_HOURS
        if self.high <= bound and self.requests >= LEAST:
            return "flat"
        # Until its bound is reached, a cache grows as a leak does.
        return "grows" if self.low > bound and self.requests >= LEAST else "too short to say"


def fit(requests: Sequence[float], memory: Sequence[float]) -> Fit:
    """The slope of `memory` bytes over `requests` after the part in which it settles.

    Raises ValueError when fewer than two samples a block are left.
    """
    x, y = np.asarray(requests, float), np.asarray(memory, float)
    late = x >= x[0] + SETTLES * (x[-1] - x[0])
    x, y = x[late], y[late]
    if len(x) < 2 * BLOCKS:
        raise ValueError(f"{len(x)} samples are too few for {BLOCKS} blocks; let it run longer")
    # Neighbouring samples are alike: means of blocks are what may count as independent.
    means = [
        (a.mean(), b.mean())
        for a, b in zip(*(np.array_split(v, BLOCKS) for v in (x, y)), strict=True)
    ]
    x, y = np.array(means).T
    found: Any = theilslopes(y, x, 0.95)
    return Fit(
        float(found.slope),
        float(found.low_slope),
        float(found.high_slope),
        float(y.mean()),
        float(x[-1] - x[0]),
    )


def main(config: Config) -> int:
    load = environment.foreign_load()
    about = environment.describe("benchmarks.soak")
    cache = Path(".tte/soak-compiled").absolute()
    with tempfile.TemporaryDirectory(prefix="tte-soak-") as made:
        folder = Path(config.data_dir or made)
        flags = ["--port=0", f"--compile-cache={cache}"]
        with launch.services(
            folder, wait_s=config.start_timeout, out=Output(json=True), flags=flags
        ) as started:
            state = system_state.read(folder)
            assert state is not None
            pids = {service.name: service.pid for service in state.services}
            done, samples, seconds = soak(started.address("gateway"), pids, config)
            after = system_state.read(folder)
            restarted = after is None or {s.name: s.pid for s in after.services} != pids
    fits = {name: fit(samples["requests"], samples[name]) for name in pids}
    result = about | {
        "noisy": environment.noisy(load),
        "foreign_load": {"before": load},
        "seconds": round(seconds, 1),
        "answered": dict(done.counts),
        "requests": done.requests,
        "share_of_eight_hours": round(done.requests / EIGHT_HOURS, 3),
        "restarted": restarted,
        "limit": LIMIT,
        "services": {
            name: {
                "memory_mb": round(one.memory / 1e6, 1),
                "kb_per_1000_requests": round(one.slope, 2),
                "interval": [round(one.low, 2), round(one.high, 2)],
                "growth_in_8_h": round(one.slope * EIGHT_HOURS / one.memory, 4),
                "growth_interval": [
                    round(end * EIGHT_HOURS / one.memory, 4) for end in (one.low, one.high)
                ],
                "verdict": one.verdict,
            }
            for name, one in fits.items()
        },
        "samples": samples,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result) + "\n")
    print(summary(result))
    print(f"{done.requests} requests in {seconds:.0f} s. Wrote {config.out}.")
    return int(restarted or any(one.verdict == "grows" for one in fits.values()))


def soak(
    gateway: str, pids: dict[str, int], config: Config
) -> tuple[Done, dict[str, list[float]], float]:
    """Loads the gateway. Returns what was answered, samples by process, and the seconds.

    Raises the first error that is not one of load.
    """
    done, errors = Done(), []
    rng = random.Random(config.seed)
    pool = [picture(rng) for _ in range(POOL)]
    threads = [
        threading.Thread(target=_guarded, args=(work, gateway, pool, done, errors, seed))
        for seed, work in enumerate([_write, *[_search] * config.clients], start=config.seed)
    ]
    samples: dict[str, list[float]] = {"requests": [], **{name: [] for name in pids}}
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while not errors:
            time.sleep(1)
            samples["requests"].append(done.requests)
            for name, pid in pids.items():
                samples[name].append(private_bytes(pid))
            if config.minutes and time.monotonic() - began > 60 * config.minutes:
                break
            if config.requests and done.requests >= config.requests:
                break
    finally:
        done.stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return done, samples, time.monotonic() - began


def summary(result: dict[str, Any]) -> str:
    """A row for each process."""
    rows = []
    for name, one in result["services"].items():
        low, high = (f"{100 * end:+.1f}" for end in one["growth_interval"])
        rows.append([
            name, f"{one['memory_mb']:.0f}",
            f"{100 * one['growth_in_8_h']:+.1f} % ({low} to {high})", one["verdict"],
        ])  # fmt: skip
    return table(["service", "memory, MB", "growth in 8 h (95 %)", "verdict"], rows)


def _guarded(work: Any, gateway: str, pool: list[bytes], done: Done, errors: list, seed: int):
    try:
        with Client(gateway) as client:
            while not done.stop.is_set():
                try:
                    work(client, random.Random(f"{seed} {done.requests}"), pool, done)
                except (OverloadedError, UnavailableError) as error:
                    done.add(error.code)
                    time.sleep(min(error.retry_after_s, 1.0))
    except BaseException as error:
        errors.append(error)


def _search(client: Client, rng: random.Random, pool: list[bytes], done: Done) -> None:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    kind = rng.choice(("text", "image", "composed"))
    content = {
        "text": Content.of(text),
        "image": Content.of("", rng.choice(pool)),
        "composed": Content.of(text, rng.choice(pool)),
    }[kind]
    budget = Budget(
        reasoning_tokens=rng.choice((0, 16, 32)),
        candidates=20,
        rewrite_depth=rng.choice((0, 0, 0, 2)),
        rerank_depth=5,
    )
    try:
        last = client.search_final(SearchQuery(content, budget=budget, deadline_s=60.0))
        done.add(f"{kind}, degraded" if last.degraded else kind)
    except TteError as error:
        if isinstance(error, OverloadedError | UnavailableError):
            raise
        done.add(error.code)


def _write(client: Client, rng: random.Random, pool: list[bytes], done: Done) -> None:
    """Some documents in, and half of them out again; ids repeat, so that the corpus stays small."""
    documents = [
        Document(
            f"soak-{rng.randrange(200)}-{n}",
            Content.of(" ".join(rng.choices(WORDS, k=6)), *rng.sample(pool, n % 2)),
            {"n": n},
        )
        for n in range(BATCH)
    ]
    options = IngestOptions(reasoning_tokens=16)
    *_, last = client.ingest(documents, options, timeout_s=120.0)
    done.add("ingested", last.stored + last.skipped)
    if last.failed:
        done.add("failed", last.failed)
    deleted, _ = client.delete_documents([d.id for d in documents[::2]], timeout_s=60.0)
    done.add("deleted", len(deleted))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
