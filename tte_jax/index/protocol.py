"""What the live index asks of an approximate searcher."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Searcher(Protocol):
    """An immutable index over the rows of one [N, D] float32 matrix; safe from many threads.

    It proposes rows; the live index scores them exactly, drops the dead and breaks ties. So a
    searcher can miss a neighbour, but it can never report a wrong score or a deleted document.
    """

    kind: str

    def propose(self, query: np.ndarray, count: int) -> np.ndarray:
        """About `count` rows (int64, unique, any order) likely to be nearest to `query` [D]."""
        ...

    def search_harder(self) -> bool:
        """Trade speed for recall by one step; False when there is no step left.

        Called only while the searcher is being checked, before it serves.
        """
        ...
