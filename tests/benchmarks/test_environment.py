"""How idle the machine was, from readings of /proc/stat with known answers."""

from __future__ import annotations

import pytest

from benchmarks import environment

# user nice system idle iowait irq softirq steal guest guest_nice
BEFORE = "cpu  100 0 50 800 50 0 0 0 10 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


def stat(user: int, idle: int, iowait: int = 0, steal: int = 0) -> str:
    return f"cpu  {100 + user} 0 50 {800 + idle} {50 + iowait} 0 0 {steal} 10 0\n"


@pytest.mark.parametrize(
    ("after", "share"),
    [
        (stat(user=0, idle=100), 0.0),
        (stat(user=100, idle=0), 1.0),
        (stat(user=25, idle=75), 0.25),
        (stat(user=0, idle=50, iowait=50), 0.0),  # waiting for a disk leaves the cores free
        (stat(user=0, idle=60, steal=40), 0.4),  # what the host took was not there for us
    ],
)
def test_busy_share(after: str, share: float) -> None:
    assert environment.busy_share(BEFORE, after) == pytest.approx(share)


def test_readings_that_say_nothing_are_errors() -> None:
    with pytest.raises(ValueError, match="no time has passed"):
        environment.busy_share(BEFORE, BEFORE)
    with pytest.raises(ValueError, match="expected the line `cpu"):
        environment.busy_share("intr 1 2 3\n", BEFORE)


def test_more_than_fifteen_percent_is_noisy() -> None:
    assert environment.noisy(0.01, 0.16)
    assert not environment.noisy(0.01, 0.15)


def test_a_result_says_where_it_comes_from() -> None:
    about = environment.describe("benchmarks.search", ["--queries", "6"])
    assert about["command"] == "python -m benchmarks.search --queries 6"
    assert about["machine"]["cores"] >= 1 and about["versions"]["jax"]
