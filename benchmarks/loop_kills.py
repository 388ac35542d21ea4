"""`kill -9` of the rHNM loop, its reranker service and its trainer at random moments.

    python -m benchmarks.loop_kills --kills 30

The real commands: `python -m training.loop` over small texts, the built-in models, a reranker that
the loop starts, and `training.contrastive` as the trainer. One run is left alone. The others are
killed again and again, started again with the same command, and compared with it: every sealed
round and every retriever must be the same bytes, and each example must stand in each round once.
The writer of the rounds lives in the loop's process: "loop while mining" is a kill of the writer. A
run that comes to its end is compared at once, and the next one begins.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import environment
from training.mining.rounds import Round, sealed
from training.mining.stream import RoundStream
from training.mining.workspace import Workspace, tree_hash

ANIMALS = "cat dog owl fox hen bee ant cow elk emu jay yak".split()
COLOURS = "red blue green black".split()
LOOP, RERANKER, TRAINER = "loop", "reranker", "trainer"
VICTIMS = {RERANKER: "servers reranker", TRAINER: "training.contrastive"}
"""Children of the loop, by what stands in their command line."""
POLL_S = 0.1


@dataclass(frozen=True)
class Options:
    """What is killed, and how often.

    Attributes:
      work: folder of all runs; emptied first.
      steps: of each round's training; a checkpoint is written after every second one.
      seed: of the moments and victims.
    """

    kills: int = 30
    work: Path = Path(".data/runs/loop_kills")
    rounds: int = 2
    steps: int = 6
    seed: int = 0
    out: Path = Path("benchmarks/results/loop_kills.json")


def write_data(path: Path) -> int:
    """Names of coloured animals, a document each; returns how many."""
    names = [f"{colour} {animal}" for animal in ANIMALS for colour in COLOURS]
    rows = [
        {"key": name, "dataset": "animals", "query": name, "positives": [f"a {name} face"]}
        for name in names
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


class Loop:
    """A run in `work/name`, as often as it is started."""

    def __init__(self, options: Options, name: str) -> None:
        self.space = Workspace(options.work / name, "export")
        trainer = (
            "{python} -m training.contrastive --config builtin --data {data} --model {model} "
            f"--out {{out}} --counts.negatives {{count}} --steps {options.steps} "
            "--global-batch 16 --sub-batch 16 --checkpoint-every 2 --report-every 1"
        )
        self._command = [
            sys.executable, "-m", "training.loop", f"--data=jsonl:{options.work / 'animals.jsonl'}",
            f"--state={self.space.root}", f"--rounds={options.rounds}", "--rules.depth=16",
            "--rules.negatives=3", "--window=3", "--part-records=8", "--embed-batch=8",
            "--embed-chunk=16", f"--trainer={trainer}",
        ]  # fmt: skip
        self._cache = options.work / "compile-cache"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.space.root.mkdir(parents=True, exist_ok=True)
        # The programs are the same ones; compiling them anew is not what is looked at.
        if self._cache.exists() and not (self.space.root / "compile-cache").exists():
            shutil.copytree(self._cache, self.space.root / "compile-cache")
        with (self.space.root / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=environment.ROOT,
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(self._cache.absolute())},
            )

    def keep_programs(self) -> None:
        """What this run compiled, for the others."""
        shutil.copytree(self.space.root / "compile-cache", self._cache, dirs_exist_ok=True)

    def alive(self) -> dict[str, int]:
        """Process by victim. A trainer that outlived its loop is found by its command line."""
        assert self._process is not None
        found = {LOOP: self._process.pid} if self._process.poll() is None else {}
        for pid, line in _command_lines():
            for victim, mark in VICTIMS.items():
                if mark in line and str(self.space.root) in line:
                    found[victim] = pid
        return found

    def kill(self, victim: str) -> bool:
        """Whether it was still there to be killed."""
        pid = self.alive().get(victim)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def ended(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def phase(self) -> str:
        """Which part of a round is under way, from what is on the disk."""
        done = len(sealed(self.space.rounds))
        trained = len(list((self.space.root / "models").glob("*.json")))
        if done > trained:
            return "training"
        return "mining" if list(self.space.rounds.glob("*.open")) else "embedding"

    def hashes(self, rounds: int) -> dict[str, str]:
        """Of all rounds and retrievers."""
        made = {f"round {n}": tree_hash(self.space.round(n)) for n in range(rounds)}
        return made | {f"retriever {n}": tree_hash(self.space.retriever(n)) for n in range(rounds)}

    def unlike(self, examples: list[str], rounds: int) -> list[str]:
        """What is lost or seen twice: of each round, and of its stream to two hosts."""
        found = []
        for number in range(rounds):
            if [r.example for r in Round(self.space.round(number))] != examples:
                found.append(f"round {number}")
        hosts = [RoundStream(self.space.rounds, batch=8, host=h, hosts=2) for h in range(2)]
        seen = [r.example for both in zip(*hosts, strict=True) for s in both for r in s.records]
        return found if seen == examples * rounds else [*found, "stream"]


def _command_lines() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, UnicodeDecodeError):
                continue
            found.append((int(entry.name), line))
    return found


def main(options: Options) -> int:
    shutil.rmtree(options.work, ignore_errors=True)
    write_data(options.work / "animals.jsonl")
    examples = [json.loads(line)["key"] for line in
                (options.work / "animals.jsonl").read_text().splitlines()]  # fmt: skip
    whole = Loop(options, "whole")
    whole.start()
    if whole.wait():
        print(f"the undisturbed run failed; see {whole.space.root}/log.txt", file=sys.stderr)
        return 1
    whole.keep_programs()
    # Again, with everything compiled: how long a run is, and whether two of them are equal at all.
    second, begun = Loop(options, "again"), time.monotonic()
    second.start()
    second.wait()
    length = time.monotonic() - begun
    wanted = whole.hashes(options.rounds)
    different = [n for n, h in second.hashes(options.rounds).items() if h != wanted[n]]
    shutil.rmtree(second.space.root)

    choose = random.Random(options.seed)
    hit: Counter[str] = Counter()
    starts = runs = 0
    lost: list[str] = []
    run = Loop(options, "killed-0")
    run.start()

    def finished() -> None:
        nonlocal runs
        different.extend(n for n, h in run.hashes(options.rounds).items() if h != wanted[n])
        lost.extend(run.unlike(examples, options.rounds))
        runs += 1
        shutil.rmtree(run.space.root)

    def until(moment: float) -> None:
        """Starts the run again whenever it has ended, and a new one when it is done."""
        nonlocal run, starts
        while time.monotonic() < moment:
            if (code := run.ended()) is not None:
                if code == 0:
                    finished()
                    run = Loop(options, f"killed-{runs}")
                starts += 1
                run.start()
            time.sleep(POLL_S)

    while sum(hit.values()) < options.kills:
        until(time.monotonic() + choose.uniform(0.02, 0.5) * length)
        there = sorted(run.alive())
        victim, phase = choose.choice(there or [LOOP]), run.phase()
        if run.kill(victim):
            hit[f"{victim} while {phase}"] += 1
            print(sum(hit.values()), victim, phase, file=sys.stderr, flush=True)
    while (code := run.wait()) != 0:
        starts += 1
        if starts > 10 * options.kills:
            print(f"it does not end, last code {code}: {run.space.root}/log.txt", file=sys.stderr)
            return 1
        run.start()
    finished()
    made = {
        **environment.describe("benchmarks.loop_kills"),
        "noisy": False,  # what is compared is bytes
        "kills": sum(hit.values()),
        "by_victim": _by(hit, 0),
        "by_phase": _by(hit, 1),
        "by_both": dict(sorted(hit.items())),
        "examples": len(examples),
        "rounds": options.rounds,
        "runs_compared": runs,
        "seconds_of_a_run": round(length, 1),
        "different": sorted(set(different)),
        "lost_or_twice": sorted(set(lost)),
        "equal": not different and not lost,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))
    return 0 if made["equal"] else 1


def _by(hit: Mapping[str, int], part: int) -> dict[str, int]:
    made: Counter[str] = Counter()
    for name, count in hit.items():
        made[name.split(" while ")[part]] += count
    return dict(sorted(made.items()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
