"""A cache bounded in bytes: what was used longest ago leaves first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLru(Generic[T]):
    """Thread-safe; counts its hits and misses. A value larger than the bound is not kept."""

    def __init__(self, max_bytes: int, size_of: Callable[[T], int]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        """Whether the value is there; no use of it, and neither a hit nor a miss."""
        with self._lock:
            return key in self._values

    def get(self, key: Hashable) -> T | None:
        """The value, now the most recently used one; None when it is not there."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
            else:
                self.hits += 1
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: T) -> None:
        """Keeps the value and drops the oldest ones beyond the bound."""
        size = self._size_of(value)
        with self._lock:
            old = self._values.pop(key, None)
            if old is not None:
                self.bytes -= self._size_of(old)
            if size > self._max_bytes:
                return
            self._values[key] = value
            self.bytes += size
            while self.bytes > self._max_bytes:
                _, dropped = self._values.popitem(last=False)
                self.bytes -= self._size_of(dropped)

    def clear(self) -> None:
        """Drops everything; what comes next is made anew."""
        with self._lock:
            self._values.clear()
            self.bytes = 0
