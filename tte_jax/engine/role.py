"""What the three roles share: an opened model, its table of executables and a warm-up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from jax.sharding import Mesh

from tte_jax.engine.batcher import RequestQueue
from tte_jax.engine.buckets import Buckets
from tte_jax.engine.executables import ExecutableTable, Progress, backend_compiles
from tte_jax.engine.served_model import ServedModel, open_model
from tte_jax.errors import UnavailableError
from tte_jax.sharding import Rules

T = TypeVar("T")
R = TypeVar("R")

# Decoding and tokenising release the interpreter lock in their C code; two threads keep the device
# busy on small models without taking its cores.
HOST_THREADS = 2

WINDOW = 64
"""Inputs of a long blocking call that are prepared and queued together; bounds its memory."""


class Role:
    """Base of `Reasoner`, `Embedder` and `Reranker`.

    Attributes:
      served: the model and what belongs to it.
      table: the compiled programs.
      queue: what waits for the device.
      host_pool: threads for decoding and tokenising documents; servers use the same ones.
      query_pool: the same for queries, which must not wait behind documents here either.
      name: the role's name in `tte.json`.
      stage: its name in `Usage`.
      max_queued: how many queries may wait, and how many documents. Waiting images lie in memory
        as patches, 0.3 MB each for the built-in models and 5 MB for a 448 x 448 pixel image.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    max_queued: ClassVar[int] = 512

    def __init__(self, served: ServedModel, *, queue: RequestQueue | None = None) -> None:
        self.served = served
        self.table = ExecutableTable(served.model, served.layout)
        if queue is None:
            queue = RequestQueue(max_entries=self.max_queued)
        self.queue = queue
        self.host_pool = ThreadPoolExecutor(HOST_THREADS, thread_name_prefix="host")
        self.query_pool = ThreadPoolExecutor(HOST_THREADS, thread_name_prefix="query-host")
        self._warm_lock = threading.Lock()
        self._warm_compiles = 0
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: str = "float32",
        buckets: Buckets | None = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        quantise: str | None = None,
    ) -> Self:
        """Opens a model directory; compiles at `warmup` or at the first call.

        Args, raises: as `engine.served_model.open_model`.
        """
        return cls(
            open_model(
                directory,
                role=cls.name,
                dtype=dtype,
                buckets=buckets,
                mesh=mesh,
                rules=rules,
                quantise=quantise,
            )
        )

    @property
    def version(self) -> str:
        """`name@hash`; equal for equal model files and prompts."""
        return self.served.version

    @property
    def accepts_media(self) -> bool:
        """Whether the model has a vision tower and its directory an image processor."""
        return self.served.config.vision is not None and self.served.prompts.load is not None

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, vision tokens and new tokens included."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int:
        """The largest reasoning, in new tokens; 0 for a role that does not generate."""
        return 0

    @property
    def ready(self) -> bool:
        """Whether warm-up is over."""
        return self._warm_compiles > 0

    @property
    def compile_count(self) -> int:
        """XLA compilations of this process so far; after warm-up, requests add none."""
        return backend_compiles()

    @property
    def warm_compile_count(self) -> int:
        """`compile_count` as it was when warm-up ended; 0 before."""
        return self._warm_compiles

    def warmup(self, progress: Progress | None = None) -> None:
        """Compiles every program of the role and starts its device thread. Idempotent.

        Args:
          progress: called as (done, total, name).
        """
        with self._warm_lock:
            if self._closed:
                raise UnavailableError("the model is shutting down")
            if not self.ready:
                self.table.warmup(progress)
                self._start()
                self._warm_compiles = backend_compiles()

    def close(self) -> None:
        """Fails what waits with `UnavailableError`, finishes what runs, ends the threads."""
        self.table.cancel()
        with self._warm_lock:
            if not self._closed:
                self._closed = True
                self._stop()
                for pool in (self.host_pool, self.query_pool):
                    pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def require_ready(self) -> None:
        """Raises UnavailableError before warm-up: a request must never wait for a compilation."""
        if not self.ready:
            raise UnavailableError(
                f"{self.served.name} is warming up; try again shortly", reason="WARMING_UP"
            )

    def prepare_all(self, prepare: Callable[[int, T], R], items: Sequence[T]) -> list[R]:
        """`prepare(index, item)` for all items on the host threads; the first error is raised."""
        return list(self.host_pool.map(prepare, range(len(items)), items))

    def _start(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        raise NotImplementedError


def windows(items: Sequence[T], size: int = WINDOW) -> Iterator[tuple[int, Sequence[T]]]:
    """(offset, slice) of a long list."""
    for offset in range(0, len(items), size):
        yield offset, items[offset : offset + size]


def results(futures: Iterable[Future[Any]]) -> list[Any]:
    """All results in order; on the first error the rest is cancelled and the error raised."""
    waiting = list(futures)
    try:
        return [future.result() for future in waiting]
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
