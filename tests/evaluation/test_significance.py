"""Resampling: known distributions, and seeds that make figures repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from tte_jax.errors import InvalidInputError
from tte_jax.evaluation.significance import compare, interval, interval_of_tasks


def test_interval_has_the_width_of_the_binomial() -> None:
    scores = np.repeat([0.0, 1.0], 500)
    found = interval(scores)
    assert found.mean == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(1000), rel=0.1)
    assert found == interval(scores)


def test_interval_of_tasks_weighs_tasks_alike() -> None:
    found = interval_of_tasks([np.ones(10), np.zeros(1000)])
    assert found.mean == found.low == found.high == 0.5


def test_a_real_difference_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(3)
    a = (rng.random(400) < 0.5).astype(float)
    better = a.copy()
    better[np.flatnonzero(a == 0)[:60]] = 1.0
    found = compare(a, better)
    assert (found.wins, found.losses) == (60, 0)
    assert found.difference == pytest.approx(0.15)
    assert found.p < 0.01 and found.low > 0
    # As many wins as losses.
    same = a.copy()
    flipped = np.concatenate([np.flatnonzero(a == 0)[:30], np.flatnonzero(a == 1)[:30]])
    same[flipped] = 1 - same[flipped]
    assert compare(a, same).p > 0.5
    assert compare(a, a).p == 1.0


def test_unpaired_runs_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="3 and 4 queries"):
        compare(np.zeros(3), np.zeros(4))
    with pytest.raises(InvalidInputError, match="no scores"):
        interval(np.zeros(0))
