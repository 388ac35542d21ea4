"""Stages run once, in order, and go on where they were interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.builtin.stages import Journal, Stage, run
from tte_jax.errors import PreconditionError

SCRIPT = "tests.training.builtin.stage_script"
ROOT = Path(__file__).resolve().parents[3]


def stage(out: Path, name: str, *, steps: int = 2) -> Stage:
    made = out / f"{name}.txt"
    return Stage(name, SCRIPT, (str(made), str(steps)), made)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_is_done_is_not_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = stage(tmp_path, "first"), stage(tmp_path, "second")
    run([first], tmp_path)
    first.makes.write_text("kept")
    run([first, second], tmp_path)
    assert first.makes.read_text() == "kept"
    assert [(r["name"], r["exit"]) for r in rows(tmp_path)] == [("first", 0), ("second", 0)]
    assert rows(tmp_path)[0]["command"] == first.command
    assert all(r["seconds"] > 0 for r in rows(tmp_path))
    assert "[1/2] first: done before" in capfd.readouterr().out


def test_a_failed_stage_stops_the_recipe_and_is_tried_again(tmp_path: Path) -> None:
    blocked = tmp_path / "wrong.txt"
    blocked.mkdir()  # no file can take its place
    (blocked / "full").touch()
    wrong, after = stage(tmp_path, "wrong"), stage(tmp_path, "after")
    with pytest.raises(PreconditionError, match=r"'wrong' ended with code 1.*goes on here"):
        run([wrong, after], tmp_path)
    assert [(r["name"], r["exit"]) for r in rows(tmp_path)] == [("wrong", 1)]
    assert not after.makes.exists()
    (blocked / "full").unlink()
    blocked.rmdir()
    run([wrong, after], tmp_path)
    assert after.makes.exists()
    spent = Journal(tmp_path).spent()
    assert {name: one["processes"] for name, one in spent.items()} == {"wrong": 2, "after": 1}
    both = sum(row["seconds"] for row in rows(tmp_path) if row["name"] == "wrong")
    assert spent["wrong"]["seconds"] == pytest.approx(both, abs=2e-3)


def test_a_stage_must_leave_what_it_makes(tmp_path: Path) -> None:
    lost = Stage("lost", SCRIPT, (str(tmp_path / "a"), "1"), tmp_path / "b")
    with pytest.raises(PreconditionError, match="'lost' left no .*b"):
        run([lost], tmp_path)
    kept = stage(tmp_path, "kept")
    run([kept], tmp_path)
    kept.makes.unlink()
    with pytest.raises(PreconditionError, match="kept.txt is gone"):
        run([kept], tmp_path)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run([stage(tmp_path, "one")], tmp_path)
    with pytest.raises(PreconditionError, match="another recipe.*\n.* 2\n.* 3\n"):
        run([stage(tmp_path, "one", steps=3)], tmp_path)


def test_a_line_that_was_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    one, two = stage(tmp_path, "one"), stage(tmp_path, "two")
    run([one], tmp_path)
    journal = tmp_path / "stages.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert not Journal(tmp_path).done(one)
    assert Journal(tmp_path).spent() == {}
    run([one, two], tmp_path)
    assert Journal(tmp_path).done(one) and Journal(tmp_path).done(two)


STEPS = 2000


def start(out: Path) -> subprocess.Popen[str]:
    """`run` of a stage that takes minutes and a quick one, in a process of its own."""
    code = (
        "from pathlib import Path\n"
        "from tests.training.builtin.test_stages import STEPS, stage\n"
        "from training.builtin.stages import run\n"
        f"out = Path({str(out)!r})\n"
        "run([stage(out, 'slow', steps=STEPS), stage(out, 'after')], out)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"STAGE_PAUSE": "0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, lines: int) -> None:
    until = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < until, f"{path} did not come to {lines} lines"
        time.sleep(0.02)


def goes_on(out: Path) -> None:
    """The same recipe, without pauses, does the steps that are left, each once."""
    slow, after = stage(out, "slow", steps=STEPS), stage(out, "after")
    done = len((out / "slow.txt.partial").read_text().splitlines())
    assert 1 <= done < STEPS
    run([slow, after], out)
    assert slow.makes.read_text().split() == [str(i) for i in range(STEPS)]
    assert after.makes.exists()


def test_a_signal_ends_the_stage_and_the_next_run_goes_on_there(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_for(tmp_path / "slow.txt.partial", 2)
    # Nobody else may write there meanwhile.
    with pytest.raises(PreconditionError, match="another run goes on"):
        run([stage(tmp_path, "after")], tmp_path)
    first.terminate()
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    assert "slow: stopped" in said
    assert [(r["name"], r["exit"]) for r in rows(tmp_path)] == [("slow", 143)]
    goes_on(tmp_path)


def test_the_stage_of_a_killed_run_has_the_folder_to_itself(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_for(tmp_path / "slow.txt.partial", 1)
    first.kill()
    first.wait()
    assert first.stdout is not None
    first.stdout.close()  # the orphan holds its other end
    with pytest.raises(PreconditionError, match="another run goes on"):
        run([stage(tmp_path, "after")], tmp_path)
    os.kill(int((tmp_path / "slow.txt.pid").read_text()), signal.SIGTERM)
    until = time.monotonic() + 120
    while True:
        try:
            return goes_on(tmp_path)
        except PreconditionError:
            assert time.monotonic() < until, "the orphan did not end"
            time.sleep(0.05)
