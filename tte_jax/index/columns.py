"""Filters over many rows at once.

Each metadata field that a filter names is factorised once into codes and distinct values; a leaf
condition then looks at every distinct value, not at every row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from tte_jax.content import Metadata, MetadataValue
from tte_jax.filters import AllOf, AnyOf, Filter, Not


class Columns:
    """The metadata of a fixed list of rows, by field. Safe from many threads.

    Args:
      rows: one metadata mapping per row; must not change afterwards.
    """

    def __init__(self, rows: Sequence[Metadata]) -> None:
        self._rows = rows
        # Fields that no row has are not cached: callers can make up any number of them.
        self._fields = {field for row in rows for field in row}
        self._columns: dict[str, tuple[np.ndarray, list[Metadata]]] = {}
        self._lock = threading.Lock()

    def mask(self, condition: Filter) -> np.ndarray:
        """[N] bool: the rows that `condition` matches, as `condition.matches` would say."""
        if isinstance(condition, AllOf):
            out = np.ones(len(self._rows), dtype=bool)
            for part in condition.filters:
                out &= self.mask(part)
            return out
        if isinstance(condition, AnyOf):
            out = np.zeros(len(self._rows), dtype=bool)
            for part in condition.filters:
                out |= self.mask(part)
            return out
        if isinstance(condition, Not):
            return ~self.mask(condition.filter)
        if condition.field not in self._fields:
            return np.full(len(self._rows), condition.matches({}), dtype=bool)
        codes, values = self._column(condition.field)
        return np.array([condition.matches(value) for value in values], dtype=bool)[codes]

    def _column(self, field: str) -> tuple[np.ndarray, list[Metadata]]:
        with self._lock:
            if field not in self._columns:
                self._columns[field] = _factorise(field, self._rows)
            return self._columns[field]


def _factorise(field: str, rows: Sequence[Metadata]) -> tuple[np.ndarray, list[Metadata]]:
    codes = np.empty(len(rows), dtype=np.int32)
    # 1, 1.0 and True are one key of a Python dict but not one value of a filter.
    seen: dict[tuple[type, MetadataValue | None], int] = {}
    values: list[Metadata] = []
    for i, row in enumerate(rows):
        value = row.get(field)
        key = (type(value), value)
        code = seen.get(key)
        if code is None:
            code = seen[key] = len(values)
            values.append({} if value is None else {field: value})
        codes[i] = code
    return codes, values
