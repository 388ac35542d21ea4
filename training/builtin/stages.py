"""A recipe of several commands: each once, in order, gone on with where it was interrupted.

A stage is a module with its options, run as a process of its own. `OUT/stages.jsonl` says which are
complete (name, command, seconds, exit code, one line for every process that ended); those are not
run again. A stage that was cut short is started again with the same options, and those that keep
checkpoints go on from the newest one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tte_jax.errors import PreconditionError


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
      name: unique within the recipe.
      module: what `python -m` runs.
      options: its command line.
      makes: a file that is there once the stage is complete.
    """

    name: str
    module: str
    options: tuple[str, ...]
    makes: Path

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", self.module, *self.options])


class Journal:
    """`stages.jsonl` of a folder."""

    def __init__(self, out: Path) -> None:
        self._path = out / "stages.jsonl"

    def done(self, stage: Stage) -> bool:
        """Whether a stage is complete.

        Raises:
          PreconditionError: it is, but with other options, or what it made is gone.
        """
        last = next((row for row in reversed(self._rows()) if row["name"] == stage.name), None)
        if last is None:
            return False
        if last["command"] != stage.command:
            raise PreconditionError(
                f"{self._path.parent} holds the stage {stage.name!r} of another recipe:"
                f"\n  there {last['command']}\n  now   {stage.command}\n"
                "Give the options of that run, or another --out.",
                reason="RUN_MISMATCH",
            )
        if last["exit"] == 0 and not stage.makes.exists():
            raise PreconditionError(
                f"the stage {stage.name!r} was completed, but {stage.makes} is gone. Put it back,"
                f" or take the stage's line out of {self._path} to run it again.",
                reason="STAGE_LOST",
            )
        return last["exit"] == 0

    def spent(self) -> dict[str, dict[str, float]]:
        """By stage: "seconds" of all its processes that ended, and how many "processes"."""
        found: dict[str, dict[str, float]] = {}
        for row in self._rows():
            one = found.setdefault(row["name"], {"seconds": 0.0, "processes": 0})
            one["seconds"] = round(one["seconds"] + row["seconds"], 3)
            one["processes"] += 1
        return found

    def _rows(self) -> list[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else ()
        # A line that a crash cut short says nothing: its stage is run again.
        return [json.loads(line) for line in lines if line.endswith("}")]

    def add(self, stage: Stage, *, seconds: float, code: int) -> None:
        row = {"name": stage.name, "command": stage.command}
        row |= {"seconds": round(seconds, 3), "exit": code}
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # after a line that was cut short
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def run(stages: Sequence[Stage], out: Path) -> None:
    """Runs what is not complete yet.

    SIGTERM and SIGINT end the stage under way, which saves what it can, and then this process.

    Raises:
      PreconditionError: the folder holds another recipe, another run goes on there, or a stage
        failed.
      SystemExit: after a signal, with 128 + its number.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out)
    with _only_one(out) as lock:
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            if journal.done(stage):
                print(f"{title}: done before", flush=True)
                continue
            print(f"{title}: {stage.command}", flush=True)
            started = time.monotonic()
            code, received = _process(stage, lock)
            seconds = time.monotonic() - started
            journal.add(stage, seconds=seconds, code=code)
            if received:
                print(f"{title}: stopped; the same command goes on here", flush=True)
                raise SystemExit(128 + received)
            if code or not stage.makes.exists():
                raise PreconditionError(
                    f"the stage {stage.name!r} "
                    + (f"ended with code {code}" if code else f"left no {stage.makes}")
                    + "; its own output says why. The same command goes on here once that is"
                    " mended.",
                    reason="STAGE_FAILED",
                )
            print(f"{title}: {seconds:.0f} s", flush=True)


def _process(stage: Stage, lock: int) -> tuple[int, int]:
    """(exit code, signal that this process received meanwhile or 0)."""
    received = 0
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        del frame
        received = number
        # A terminal sends Ctrl-C to the stage by itself, and a second one would cut it short.
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        command = [sys.executable, "-m", stage.module, *stage.options]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,))
        if received:  # between the two lines above
            child.send_signal(signal.SIGTERM)
        return child.wait(), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(out: Path) -> Iterator[int]:
    """A locked file descriptor that stages inherit: a stage whose parent was killed holds it too,
    so that two never write one folder.

    Raises PreconditionError while another run holds it.
    """
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreconditionError(
                f"another run goes on in {out}. Wait for it, stop it, or give another --out.",
                reason="RUN_GOES_ON",
            ) from None
        yield handle
    finally:
        os.close(handle)
