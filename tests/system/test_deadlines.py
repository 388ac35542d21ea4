"""A deadline is kept: an error or the results that there are, never a hang."""

from __future__ import annotations

import time

import pytest

from tests.system.running import System, query
from tte_jax.cascade import SearchUpdate
from tte_jax.client import Client
from tte_jax.errors import DeadlineExceededError

# Far above what any deadline here allows: a machine that is busy elsewhere is late, not hung.
LATE_S = 20.0


def ask(client: Client, deadline_s: float, text: str) -> SearchUpdate | None:
    """The final answer, `None` for DEADLINE_EXCEEDED; anything else fails."""
    start = time.monotonic()
    try:
        answer = client.search_final(query(text, deadline_s=deadline_s))
    except DeadlineExceededError:
        answer = None
    assert time.monotonic() - start < deadline_s + LATE_S
    return answer


@pytest.mark.parametrize("deadline_s", [0.001, 0.01, 0.03, 0.06, 0.1, 0.2, 0.5])
def test_a_short_deadline(client: Client, deadline_s: float) -> None:
    for number in range(4):
        answer = ask(client, deadline_s, f"red cat {number}")
        if answer is not None:
            assert answer.final and answer.results
            whole = {"reason", "embed", "index", "rerank"} <= {u.stage for u in answer.usage}
            assert whole or answer.degraded  # what is missing is said


def test_a_deadline_that_nothing_can_meet(client: Client) -> None:
    assert ask(client, 0.001, "blue dog") is None


def test_an_ample_deadline_gets_everything(system: System, client: Client) -> None:
    # Short deadlines teach the gateway to skip stages; that must wear off by itself.
    answers = (ask(client, 60.0, f"green face {number}") for number in range(20))
    assert any(answer is not None and not answer.degraded for answer in answers)
    system.assert_healthy()
