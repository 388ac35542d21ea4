"""Ranks of held-out queries: right answers are found where they stand."""

from __future__ import annotations

import numpy as np

from training.builtin.heldout import places


def test_a_place_is_how_many_stand_before() -> None:
    documents = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    queries = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
    # The second and the third document are equal: the earlier one stands first.
    assert places(queries, documents, np.array([1, 2, 1, 3])).tolist() == [0, 1, 2, 2]
