"""`kill -9` of the loop (with its writer and trainer) and of the reranker, at random moments: the
rounds and retrievers of the run that was killed are those of one that was not, byte for byte.

TTE_LOOP_KILLS says how often (`make crash`: 30 times).
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.mining.hand import example_rows, write_model
from tests.training.test_data_sources import write_jsonl
from training.mining.rounds import Round, sealed
from training.mining.stream import RoundStream
from training.mining.workspace import tree_hash

pytestmark = pytest.mark.training_runs

KILLS = int(os.environ.get("TTE_LOOP_KILLS", "6"))
ROUNDS = 2
ROOT = Path(__file__).parents[3]


class Starter:
    """The process of `loop_process.py`."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.mining.loop_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )
        self._read()
        self.running: set[int] = set()

    def start(self, **asked: object) -> int:
        pid = int(self._ask(asked))
        self.running.add(pid)
        return pid

    def kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        """Exit code; −9 for a process that was killed."""
        self.running.discard(pid)
        return int(self._ask({"wait": pid}))

    def close(self) -> None:
        for pid in list(self.running):
            self.kill(pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._errors.close()

    def _ask(self, asked: dict) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, Path(self._errors.name).read_text()
        return line


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    made = Starter(tmp_path / "errors.txt")
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def results(state: Path) -> dict[str, str]:
    """Hash of every sealed round and every finished retriever."""
    made = {f"round {n}": tree_hash(state / f"rounds/round-{n:05d}") for n in range(ROUNDS)}
    return made | {f"model {n}": tree_hash(state / f"models/round-{n:05d}") for n in range(ROUNDS)}


def where(state: Path) -> str:
    """Which part of a round a kill has hit, from what is on disk."""
    done = len(sealed(state / "rounds"))
    trained = len(list((state / "models").glob("*.json"))) if (state / "models").exists() else 0
    if done > trained:
        return "training"
    if list((state / "rounds").glob("*.open")):
        return "mining"
    return "embedding"


@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_at_random_the_rounds_are_the_same(tmp_path: Path, starter: Starter) -> None:
    data = write_jsonl(tmp_path / "birds.jsonl", example_rows(60))
    write_model(tmp_path / "first")
    port = free_port()
    address = f"127.0.0.1:{port}"

    def start_loop(name: str) -> int:
        return starter.start(
            run="loop", state=str(tmp_path / name), data=str(data), reranker=address, rounds=ROUNDS
        )

    reranker = starter.start(run="reranker", port=port)
    begun = time.monotonic()
    assert starter.wait(start_loop("whole")) == 0, (tmp_path / "errors.txt").read_text()
    length = time.monotonic() - begun
    whole = results(tmp_path / "whole")
    assert whole["round 0"] != whole["round 1"] and whole["model 0"] != whole["model 1"]

    choose = random.Random(KILLS)
    hit: Counter[str] = Counter()
    state = tmp_path / "killed-0"
    running = start_loop(state.name)
    for kill in range(KILLS):
        # Runs that came to their end are compared too, and another one begins.
        time.sleep(choose.uniform(0.05, 0.6 * length))
        if choose.random() < 0.5:
            hit[f"reranker while {where(state)}"] += 1
            assert starter.kill(reranker) == -9
            time.sleep(choose.uniform(0.0, 0.3))
            reranker = starter.start(run="reranker", port=port)
        hit[f"loop while {where(state)}"] += 1
        if starter.kill(running) == 0:
            assert results(state) == whole
            state = tmp_path / f"killed-{kill + 1}"
        running = start_loop(state.name)
    assert starter.wait(running) == 0, (tmp_path / "errors.txt").read_text()
    assert results(state) == whole
    print(f"\nkilled: {dict(hit)}; an undisturbed run takes {length:.1f} s")

    # No negative is lost or seen twice: one record for each example, in every round.
    for number in range(ROUNDS):
        made = Round(state / f"rounds/round-{number:05d}")
        assert [r.example for r in made] == [f"q{i}" for i in range(60)]
    hosts = [RoundStream(state / "rounds", batch=8, host=h, hosts=2) for h in range(2)]
    seen = [r.example for shares in zip(*hosts, strict=True) for s in shares for r in s.records]
    assert seen == [f"q{i}" for i in range(60)] * 2
