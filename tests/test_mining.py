from __future__ import annotations

import math

import pytest

from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.mining import percent_of_positive


def test_hardest_below_the_positive_are_kept_and_those_above_reported():
    mined = percent_of_positive([0.1, 0.95, 0.7, 0.3, 0.8], 0.8, hardest=2)
    assert mined.negatives == (2, 3)
    assert mined.false_negatives == (1, 4)  # 0.8 is not below 1.0 x 0.8
    assert mined.threshold == pytest.approx(0.8)


def test_a_lower_threshold_drops_the_doubtful():
    scores = [0.75, 0.7, 0.2]
    assert percent_of_positive(scores, 0.8, threshold=1.0).negatives == (0, 1, 2)
    strict = percent_of_positive(scores, 0.8, threshold=0.9)
    assert strict.negatives == (1, 2)
    assert strict.false_negatives == (0,)


def test_the_positive_itself_is_in_neither_list():
    mined = percent_of_positive([0.9, 0.1], 0.9, exclude=[0])
    assert (mined.negatives, mined.false_negatives) == ((1,), ())


def test_fewer_survivors_than_wanted_and_none_at_all():
    assert percent_of_positive([0.1], 0.5, hardest=7).negatives == (0,)
    assert percent_of_positive([], 0.5).negatives == ()


def test_ties_keep_the_given_order():
    assert percent_of_positive([0.2, 0.2, 0.2], 0.5, hardest=2).negatives == (0, 1)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": 1.5}, {"hardest": 0}])
def test_nonsense_rules_are_refused(arguments):
    with pytest.raises(InvalidInputError):
        percent_of_positive([0.1], 0.5, **arguments)


@pytest.mark.parametrize(("scores", "positive"), [([math.nan], 0.5), ([0.1], math.nan)])
def test_scores_that_are_not_numbers_are_never_sorted(scores, positive):
    with pytest.raises(InternalError):
        percent_of_positive(scores, positive)
