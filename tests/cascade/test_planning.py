"""Plans are arithmetic on the time left: every figure here can be worked out by hand."""

import pytest

from tte_jax.cascade.planning import (
    FINISH_S,
    SLACK,
    UNMEASURED_FIRST_STAGE_S,
    Caps,
    Pace,
    first_stage_reserve,
    optional_time,
    reasoning_time,
    required_time,
    rerank_reserve,
)

CAPS = Caps(reason=30, rerank=15)
KNOWN = Pace({"embed": 0.2, "index": 0.1, "reason": 0.05, "rerank": 0.1}, reason_tokens=20)


def test_without_a_deadline_every_stage_gets_its_cap():
    assert reasoning_time(None, max_tokens=64, pace=KNOWN, caps=CAPS) == 30
    assert required_time(None, 10) == 10
    plan = optional_time(None, stage="rerank", depth=10, reserve=9, pace=KNOWN, cap=15)
    assert plan == (10, 15)


def test_reasoning_gets_what_the_first_stage_does_not_need():
    # 2 * (0.2 + 0.1) + FINISH_S is kept back; 20 tokens at 0.05 s, with slack, are 1.25 s.
    assert first_stage_reserve(KNOWN) == pytest.approx(0.6 + FINISH_S)
    left = reasoning_time(5, max_tokens=64, pace=KNOWN, caps=CAPS)
    assert left == pytest.approx(5 - 0.6 - FINISH_S)
    assert reasoning_time(100, max_tokens=64, pace=KNOWN, caps=CAPS) == 30


def test_reasoning_is_skipped_when_its_usual_time_does_not_fit():
    edge = 0.6 + FINISH_S + SLACK * 20 * 0.05
    assert reasoning_time(edge - 0.01, max_tokens=64, pace=KNOWN, caps=CAPS) is None
    assert reasoning_time(edge + 0.01, max_tokens=64, pace=KNOWN, caps=CAPS) is not None
    # A smaller budget cannot take as long.
    assert reasoning_time(edge - 0.01, max_tokens=10, pace=KNOWN, caps=CAPS) is not None


def test_unmeasured_reasoning_is_tried_when_the_first_stage_stays_affordable():
    reserve = UNMEASURED_FIRST_STAGE_S + FINISH_S
    left = reasoning_time(reserve + 0.1, max_tokens=64, pace=Pace(), caps=CAPS)
    assert left == pytest.approx(0.1)
    assert reasoning_time(reserve, max_tokens=64, pace=Pace(), caps=CAPS) is None


def test_required_stages_stop_before_the_deadline():
    assert required_time(3, 10) == pytest.approx(3 - FINISH_S)
    assert required_time(FINISH_S, 10) is None
    assert required_time(-1, 10) is None


def test_a_rerank_that_does_not_fit_scores_fewer():
    # 0.125 s per candidate with slack; 0.5 s left after FINISH_S: 4 candidates.
    plan = optional_time(0.5 + FINISH_S, stage="rerank", depth=10, reserve=0, pace=KNOWN, cap=15)
    assert plan == (4, pytest.approx(0.5))
    nothing = optional_time(0.1 + FINISH_S, stage="rerank", depth=10, reserve=0, pace=KNOWN, cap=15)
    assert nothing[0] == 0
    assert optional_time(0.0, stage="rerank", depth=10, reserve=0, pace=KNOWN, cap=15) == (0, 0.0)


def test_a_cap_below_the_usual_time_does_not_shrink_the_rerank():
    assert optional_time(100, stage="rerank", depth=10, reserve=0, pace=KNOWN, cap=0.5) == (10, 0.5)


def test_a_rewrite_leaves_the_rerank_its_time():
    assert rerank_reserve(KNOWN, depth=10) == pytest.approx(1.25)
    assert rerank_reserve(Pace(), depth=10) == 0
    depth, timeout = optional_time(2, stage="rewrite", depth=5, reserve=1.25, pace=KNOWN, cap=30)
    assert (depth, timeout) == (5, pytest.approx(2 - 1.25 - FINISH_S))


def test_pace_follows_what_is_measured():
    pace = Pace().observed("rerank", 1.0, 10)
    assert pace.unit_s["rerank"] == pytest.approx(0.1)
    pace = pace.observed("rerank", 2.0, 10)
    assert pace.unit_s["rerank"] == pytest.approx(0.1 + 0.3 * 0.1)
    pace = Pace().observed("reason", 2.0, 40).observed("reason", 1.0, 20)
    assert pace.reason_tokens == pytest.approx(40 - 0.3 * 20)
    assert pace.unit_s["reason"] == pytest.approx(0.05)


def test_a_stage_that_overran_is_never_thought_faster():
    assert Pace({"rerank": 0.1}).overran("rerank", 5.0, 10).unit_s["rerank"] == 0.5
    assert Pace({"rerank": 0.9}).overran("rerank", 5.0, 10).unit_s["rerank"] == 0.9


def test_a_skipped_stage_gets_another_chance():
    pace = Pace({"embed": 0.01, "index": 0.01, "reason": 1.0}, reason_tokens=10)
    skips = 0
    while reasoning_time(2, max_tokens=64, pace=pace, caps=CAPS) is None:
        pace = pace.skipped("reason")
        skips += 1
        assert skips < 20
    assert skips > 0
    assert Pace().skipped("reason") == Pace()
