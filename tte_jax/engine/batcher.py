"""One bounded, deadline-aware queue in front of one device thread.

`RequestQueue` admits requests and hands out only live ones: an entry whose deadline has passed or
whose caller has gone is dropped before any device work. `Batcher` is a queue with a thread that
runs batches of it; `tte_jax.engine.slots` puts the same queue in front of the decode loop.

What runs together is up to a `Room`: the oldest entry opens one, and the others of its lane come in
while they fit.

Queries and documents wait in lanes of their own, because a corpus on its way in keeps thousands of
documents waiting and a person waits for each query.

Futures are `concurrent.futures.Future`s (wrap them with `asyncio.wrap_future`). They stay pending
while their work runs, so that a caller can cancel at any time; whoever completes one does it
through `complete`, which does nothing when the caller was faster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    TteError,
    UnavailableError,
)

log = logging.getLogger(__name__)

QUERY_TURNS = 3
"""While both lanes wait, queries are taken so many times in a row, then documents once."""


Room = Callable[["Entry"], bool]
"""Takes an entry in, or says that there is no room for it."""


@dataclass(eq=False)
class Entry:
    """One request in the queue.

    Attributes:
      payload: what the runner gets.
      cost: tokens it will put through the model; the queue's bound counts these.
      group: entries are batched only with entries of an equal group.
      max_batch: how many of the group run at once; None = as many as the runner takes.
      deadline: `time.monotonic()` instant after which nobody wants the result; None = never.
      background: waits in the documents' lane, behind queries; else in the queries'.
      future: completed with the result or an error of `tte_jax.errors`.
      queued_at: when it was admitted (`time.monotonic()`).
      started_at: when it left the queue; 0 while it waits.
    """

    payload: Any
    cost: int = 1
    group: Any = None
    max_batch: int | None = None
    deadline: float | None = None
    background: bool = False
    future: Future[Any] = field(default_factory=Future)
    queued_at: float = 0.0
    started_at: float = 0.0

    @property
    def queue_s(self) -> float:
        return max(self.started_at - self.queued_at, 0.0)

    @property
    def dead(self) -> bool:
        return self.future.done()


@dataclass
class QueueStats:
    """Counters since the start; a reader may see them one entry late.

    Attributes:
      batches, rows, tokens: programs that ran on waiting inputs, and what they were given: rows
        with something in them, and real tokens.
      row_places, token_places: what these programs had room for; the rest was padding.
      cached_tokens: tokens whose work a cache saved (vision features, shared prefixes).
      queue_s: seconds that the inputs had waited, in all.
    """

    admitted: int = 0
    rejected: int = 0
    expired: int = 0
    cancelled: int = 0
    completed: int = 0
    failed: int = 0
    batches: int = 0
    rows: int = 0
    row_places: int = 0
    tokens: int = 0
    token_places: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0

    def ran(
        self,
        shape: tuple[int, int],
        entries: Sequence[Entry],
        tokens: int,
        *,
        used: int | None = None,
    ) -> None:
        """Counts a batch of `entries` with `tokens` real tokens, run as `shape` (rows, tokens).

        Args:
          used: rows that had something in them, where these are not just one for each entry.
        """
        rows, length = shape
        self.batches += 1
        self.rows += len(entries) if used is None else used
        self.row_places += rows
        self.tokens += tokens
        self.token_places += rows * length
        self.queue_s += sum(e.queue_s for e in entries)

    @property
    def batch_fill(self) -> float:
        """Share of the rows that were real ones, 0 to 1; 1 before the first."""
        return self.rows / self.row_places if self.row_places else 1.0

    @property
    def pad_share(self) -> float:
        """Share of the tokens that were padding, 0 to 1."""
        return 1 - self.tokens / self.token_places if self.token_places else 0.0


def complete(
    future: Future[Any], *, result: Any = None, error: BaseException | None = None
) -> bool:
    """Completes a future unless somebody has done so already; returns whether it was us."""
    try:
        if future.done():
            return False
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
        return True
    except InvalidStateError:  # cancelled between the check and the call
        return False


class _Lane:
    """Entries in order of arrival and the sum of their costs."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.cost = 0

    def keep(self, entries: deque[Entry]) -> None:
        """Replaces the entries by those of them that stay."""
        self.entries = entries
        self.cost = sum(e.cost for e in entries)


class RequestQueue:
    """Two lanes, each a FIFO bounded in entries and in tokens. Thread-safe.

    Queries go first, but of `QUERY_TURNS` + 1 turns the documents get at least one. Each lane has
    the whole bound to itself: waiting documents never cause a query to be refused.
    """

    def __init__(self, *, max_entries: int = 1024, max_cost: int = 262_144) -> None:
        self._max_entries = max_entries
        self._max_cost = max_cost
        self._queries, self._documents = _Lane(), _Lane()
        self._turns = 0  # of queries, in a row, while documents waited
        self._seconds_per_token = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self.stats = QueueStats()

    def __len__(self) -> int:
        return len(self._queries.entries) + len(self._documents.entries)

    @property
    def capacity(self) -> int:
        """How many entries may wait in each lane."""
        return self._max_entries

    @property
    def queued_cost(self) -> int:
        return self._queries.cost + self._documents.cost

    def put(self, entries: Sequence[Entry], *, wait: bool = False) -> None:
        """Admits all entries or none of them.

        Args:
          entries: a request of one or several entries; both meet the same bound.
          wait: block until there is room instead of raising `OverloadedError`; for callers in
            the same process who have nothing better to do.

        Raises:
          OverloadedError: no room now; `retry_after_s` estimates when there will be.
          InvalidInputError: the request alone is larger than a whole lane.
          UnavailableError: the queue is closed.
        """
        cost = sum(e.cost for e in entries)
        if len(entries) > self._max_entries or cost > self._max_cost:
            raise InvalidInputError(
                f"one request of {len(entries)} inputs ({cost} tokens) is more than the whole "
                f"queue holds ({self._max_entries} inputs, {self._max_cost} tokens); "
                "send several smaller requests",
                reason="BATCH_TOO_LARGE",
            )
        with self._changed:
            while not self._closed and not self._fits(entries):
                self._drop_dead()
                if self._fits(entries):
                    break
                if not wait:
                    self.stats.rejected += len(entries)
                    raise OverloadedError(
                        f"the queue is full ({len(self)} inputs, {self.queued_cost} tokens "
                        "waiting); try again later",
                        retry_after_s=self._drain_time(),
                    )
                # Woken early by every take; the timeout lets expired entries make room.
                self._changed.wait(0.1)
            if self._closed:
                raise UnavailableError("the model is shutting down; try another replica")
            now = time.monotonic()
            for entry in entries:
                entry.queued_at = now
                lane = self._lane(entry)
                lane.entries.append(entry)
                lane.cost += entry.cost
            self.stats.admitted += len(entries)
            self._changed.notify_all()

    def take(
        self,
        *,
        max_entries: int,
        max_cost: int | None = None,
        block: bool = True,
        same_group: bool = True,
        room: Callable[[Entry], Room] | None = None,
    ) -> list[Entry]:
        """The oldest live entry of one lane and those of it that may run with it, in order.

        Documents never join a batch of queries: a query pays for all rows that run with it.

        Args:
          room: makes the room of a batch for its oldest entry, which is taken in any case; further
            ones must also fit into it.

        Returns an empty list when nothing waits (`block=False`) or the queue was closed.
        """
        with self._changed:
            while True:
                self._drop_dead()
                if len(self) or not block or self._closed:
                    break
                self._changed.wait()
            lane = self._next_lane()
            taken: list[Entry] = []
            cost = 0
            now = time.monotonic()
            rest: deque[Entry] = deque()
            if lane.entries and (most := lane.entries[0].max_batch) is not None:
                max_entries = min(max_entries, most)
            enter: Room | None = None
            if lane.entries and room is not None:
                enter = room(lane.entries[0])
                enter(lane.entries[0])
            for entry in lane.entries:
                fits = len(taken) < max_entries and (
                    not taken
                    or (
                        (not same_group or entry.group == taken[0].group)
                        and (max_cost is None or cost + entry.cost <= max_cost)
                        and (enter is None or enter(entry))
                    )
                )
                if fits:
                    entry.started_at = now
                    cost += entry.cost
                    taken.append(entry)
                else:
                    rest.append(entry)
            if taken:
                lane.keep(rest)
                self._changed.notify_all()
            return taken

    def ran(self, cost: int, seconds: float) -> None:
        """Reports that `cost` tokens took `seconds`; the base of `retry_after_s`."""
        if cost > 0:
            rate = seconds / cost
            old = self._seconds_per_token
            self._seconds_per_token = rate if old == 0.0 else 0.8 * old + 0.2 * rate

    def close(self) -> list[Entry]:
        """Admits nothing more; returns what still waited."""
        with self._changed:
            self._closed = True
            left = [*self._queries.entries, *self._documents.entries]
            for lane in (self._queries, self._documents):
                lane.keep(deque())
            self._changed.notify_all()
            return left

    @property
    def closed(self) -> bool:
        return self._closed

    def _lane(self, entry: Entry) -> _Lane:
        return self._documents if entry.background else self._queries

    def _next_lane(self) -> _Lane:
        queries, documents = self._queries, self._documents
        if queries.entries and (not documents.entries or self._turns < QUERY_TURNS):
            self._turns = self._turns + 1 if documents.entries else 0
            return queries
        self._turns = 0
        return documents

    def _fits(self, entries: Sequence[Entry]) -> bool:
        for lane in (self._queries, self._documents):
            new = [e for e in entries if self._lane(e) is lane]
            if new and (
                len(lane.entries) + len(new) > self._max_entries
                or lane.cost + sum(e.cost for e in new) > self._max_cost
            ):
                return False
        return True

    def _drain_time(self) -> float:
        return min(max(self.queued_cost * self._seconds_per_token, 0.1), 30.0)

    def _drop_dead(self) -> None:
        now = time.monotonic()
        for lane in (self._queries, self._documents):
            live = deque(entry for entry in lane.entries if not self._drop(entry, now))
            if len(live) != len(lane.entries):
                lane.keep(live)
                self._changed.notify_all()

    def _drop(self, entry: Entry, now: float) -> bool:
        """Whether nobody wants the entry any more; counts it and answers its caller if so."""
        if entry.dead:
            self.stats.cancelled += 1
            return True
        if entry.deadline is None or now < entry.deadline:
            return False
        self.stats.expired += 1
        waited = now - entry.queued_at
        complete(
            entry.future,
            error=DeadlineExceededError(
                f"the deadline passed after {waited:.3f} s in the queue; nothing was run"
            ),
        )
        return True


class Batcher:
    """Runs batches of a queue on one thread of its own.

    The runner gets the entries of one group and returns one result per entry, in order. A result
    that is an exception fails that entry alone. If the runner raises, the batch is cut in two and
    each half is tried again, down to the entry at fault: its batch-mates still get their answers.
    """

    def __init__(
        self,
        run: Callable[[list[Entry]], Sequence[Any]],
        *,
        max_batch: int,
        max_batch_cost: int | None = None,
        room: Callable[[Entry], Room] | None = None,
        queue: RequestQueue | None = None,
        name: str = "device",
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_batch_cost = max_batch_cost
        self._room = room
        self.queue = RequestQueue() if queue is None else queue
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        payloads: Sequence[Any],
        *,
        costs: Sequence[int] | None = None,
        group: Hashable = None,
        deadline: float | None = None,
        wait: bool = False,
    ) -> list[Future[Any]]:
        """Queues the payloads as one request (all or none) and returns a future for each.

        Raises: as `RequestQueue.put`.
        """
        entries = [
            Entry(p, cost=costs[i] if costs else 1, group=group, deadline=deadline)
            for i, p in enumerate(payloads)
        ]
        self.queue.put(entries, wait=wait)
        return [e.future for e in entries]

    def close(self, timeout_s: float | None = 10.0) -> None:
        """Finishes the running batch, fails what waits with `UnavailableError`, ends the thread."""
        for entry in self.queue.close():
            complete(entry.future, error=UnavailableError("the model is shutting down"))
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            try:
                entries = self.queue.take(
                    max_entries=self._max_batch, max_cost=self._max_batch_cost, room=self._room
                )
                if not entries:
                    if self.queue.closed:
                        return
                    continue
                self._run_isolated(entries)
            except Exception:  # a defect here must not end the thread that everybody waits for
                log.exception("the device thread survived an unexpected error")

    def _run_isolated(self, entries: list[Entry]) -> None:
        entries = [e for e in entries if not e.dead]
        if not entries:
            return
        start = time.monotonic()
        try:
            results = list(self._run(entries))
            if len(results) != len(entries):
                raise InternalError(
                    f"the runner returned {len(results)} results for {len(entries)} inputs"
                )
        except Exception as error:
            if len(entries) > 1:
                half = len(entries) // 2
                self._run_isolated(entries[:half])
                self._run_isolated(entries[half:])
                return
            if not isinstance(error, TteError):
                log.exception("a request failed on the device")
            results = [as_tte(error)]
        self.queue.ran(sum(e.cost for e in entries), time.monotonic() - start)
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, BaseException):
                self.queue.stats.failed += 1
                complete(entry.future, error=as_tte(result))
            else:
                self.queue.stats.completed += 1
                complete(entry.future, result=result)


def as_tte(error: BaseException) -> TteError:
    """The error as callers may see it: one of ours as it is, anything else as `InternalError`."""
    if isinstance(error, TteError):
        return error
    # Callers may be on another machine: the log has the cause, the message has no internals.
    internal = InternalError("the model failed on this input; the server's log has the cause")
    internal.__cause__ = error
    return internal
