"""Figures of short runs: means over tasks, spreads over seeds, and what counts as a difference."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import short_runs


def run(*ranks: list[int]) -> dict[str, np.ndarray]:
    return {str(i): np.array(r) for i, r in enumerate(ranks)}


def test_a_mean_over_tasks_and_its_spread_over_seeds() -> None:
    # hit@1 by task: (1/2, 0) and (1, 0); MRR: (3/4, 1/4) and (1, 1/4).
    found = short_runs.summary([run([0, 1], [3]), run([0, 0], [3])], ["a", "b"])
    assert found["hit@1"]["seeds"] == [0.25, 0.5]
    assert found["hit@1"]["mean"] == 0.375
    assert found["hit@1"]["spread"] == pytest.approx(0.25 / np.sqrt(2))
    assert found["hit@1"]["tasks"] == {"a": 0.75, "b": 0.0}
    assert found["mrr"]["seeds"] == [0.5, 0.625]


def test_a_difference_needs_queries_and_seeds_that_agree() -> None:
    worse, better = run([1] * 40), run([0] * 30 + [1] * 10)
    both = short_runs.difference([worse, worse], [better, better], "hit@1")
    assert both["difference"] == 0.75 and both["seeds"] == [0.75, 0.75]
    assert both["verdict"] == "better"
    back = short_runs.difference([better, better], [worse, worse], "hit@1")
    assert back["verdict"] == "worse" and back["difference"] == -0.75
    # The queries agree, the second seed does not.
    slightly = run([0] * 31 + [1] * 9)
    mixed = short_runs.difference([worse, slightly], [better, better], "hit@1")
    assert mixed["low"] > 0 and mixed["seeds"][1] < 0
    assert mixed["verdict"] == "no difference"
    few = short_runs.difference([run([0, 1, 1])], [run([1, 0, 0])], "hit@1")
    assert few["verdict"] == "no difference"
