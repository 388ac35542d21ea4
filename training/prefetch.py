"""Host work ahead of the device."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(iterator: Iterator[T], depth: int = 4) -> Iterator[T]:
    """Run an endless iterator in a thread, `depth` items ahead; its exception is raised here."""
    queue: Queue[T | BaseException] = Queue(depth)

    def fill() -> None:
        try:
            for item in iterator:
                queue.put(item)
        except BaseException as e:  # handed over to the consumer, whatever it is
            queue.put(e)

    Thread(target=fill, daemon=True).start()
    while True:
        item = queue.get()
        if isinstance(item, BaseException):
            raise item
        yield item
