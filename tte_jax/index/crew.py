"""Threads that share the work of one call.

ScaNN and NumPy let go of Python's lock while they compute. So while one part of a batch is being
scanned, the Python steps of another run on the core beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


class Crew:
    """`threads` threads, the caller's among them; the others are started by the first work.

    Any number of threads may call `map` at once. A caller never waits for a part that nobody has
    begun: it works on its own parts until none is left.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._others = (
            ThreadPoolExecutor(self.threads - 1, thread_name_prefix="index-search")
            if self.threads > 1
            else None
        )

    def map(self, work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """`work` of each part, in order. Raises what the first part to fail raised, once no part
        is being worked on any more."""
        if self._others is None or len(parts) < 2:
            return [work(part) for part in parts]
        todo = deque(enumerate(parts))
        done: dict[int, Result] = {}
        failed: list[BaseException] = []

        def take() -> None:
            while True:
                try:
                    place, part = todo.popleft()
                except IndexError:
                    return
                try:
                    done[place] = work(part)
                except BaseException as error:
                    failed.append(error)
                    todo.clear()

        helping = [self._others.submit(take) for _ in range(min(self.threads, len(parts)) - 1)]
        take()
        for one in helping:
            if not one.cancel():
                one.result()
        if failed:
            raise failed[0]
        return [done[place] for place in range(len(parts))]
