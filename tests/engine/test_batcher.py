"""The queue and its thread; gates instead of clocks, so nothing here depends on speed."""

from __future__ import annotations

import threading
import time

import pytest

from tte_jax.engine.batcher import QUERY_TURNS, Batcher, Entry, RequestQueue, complete
from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)

WAIT_S = 30.0


class Squares:
    """A runner that squares numbers; it stops at a gate, and None poisons it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[object]] = []

    def __call__(self, entries):
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.batches.append([e.payload for e in entries])
        return [e.payload * e.payload for e in entries]

    def hold(self) -> None:
        self.gate.clear()
        self.entered.clear()


@pytest.fixture
def runner():
    return Squares()


@pytest.fixture
def batcher(runner):
    made = Batcher(runner, max_batch=4, queue=RequestQueue(max_entries=8, max_cost=100))
    yield made
    runner.gate.set()
    made.close()


def occupy(batcher, runner):
    """Puts one entry on the device and leaves it there, so that what follows stays queued."""
    runner.hold()
    (future,) = batcher.submit([1])
    assert runner.entered.wait(WAIT_S)
    return future


def test_results_come_back_to_their_own_callers(batcher):
    futures = batcher.submit([2, 3, 4, 5, 6, 7])
    assert [f.result(WAIT_S) for f in futures] == [4, 9, 16, 25, 36, 49]


def test_waiting_entries_run_as_one_batch_up_to_the_limit(batcher, runner):
    first = occupy(batcher, runner)
    futures = [f for n in range(6) for f in batcher.submit([n])]
    runner.gate.set()
    assert first.result(WAIT_S) == 1
    assert [f.result(WAIT_S) for f in futures] == [0, 1, 4, 9, 16, 25]
    assert runner.batches == [[1], [0, 1, 2, 3], [4, 5]]


def test_groups_are_never_mixed_and_order_is_kept(batcher, runner):
    occupy(batcher, runner)
    futures = [
        f for n, group in [(1, "a"), (2, "b"), (3, "a")] for f in batcher.submit([n], group=group)
    ]
    runner.gate.set()
    assert [f.result(WAIT_S) for f in futures] == [1, 4, 9]
    assert runner.batches[1:] == [[1, 3], [2]]


def test_a_full_queue_refuses_the_whole_request_at_once(batcher, runner):
    occupy(batcher, runner)
    waiting = batcher.submit([1] * 7)
    with pytest.raises(OverloadedError) as caught:
        batcher.submit([1, 2])
    assert caught.value.retry_after_s > 0
    last = batcher.submit([3])  # all or nothing: the refused pair took no room
    runner.gate.set()
    assert [f.result(WAIT_S) for f in [*waiting, *last]] == [1] * 7 + [9]
    assert batcher.queue.stats.rejected == 2
    assert batcher.queue.queued_cost == 0


def test_the_bound_also_counts_tokens(batcher, runner):
    occupy(batcher, runner)
    batcher.submit([1], costs=[90])
    with pytest.raises(OverloadedError):
        batcher.submit([1], costs=[11])
    batcher.submit([1], costs=[10])


def test_a_request_larger_than_the_queue_is_the_callers_mistake(batcher):
    with pytest.raises(InvalidInputError, match="9 inputs"):
        batcher.submit([1] * 9)
    with pytest.raises(InvalidInputError, match="101 tokens"):
        batcher.submit([1], costs=[101])
    assert batcher.submit([3])[0].result(WAIT_S) == 9


def test_waiting_for_room_instead_of_failing(batcher, runner):
    occupy(batcher, runner)
    batcher.submit([1] * 8)
    got: list[int] = []
    thread = threading.Thread(
        target=lambda: got.append(batcher.submit([5], wait=True)[0].result(WAIT_S))
    )
    thread.start()
    runner.gate.set()
    thread.join(WAIT_S)
    assert got == [25]


def test_an_expired_entry_never_reaches_the_device(batcher, runner):
    first = occupy(batcher, runner)
    (late,) = batcher.submit([7], deadline=time.monotonic() - 1.0)
    (live,) = batcher.submit([8], deadline=time.monotonic() + 3600.0)
    runner.gate.set()
    with pytest.raises(DeadlineExceededError, match="nothing was run"):
        late.result(WAIT_S)
    assert (first.result(WAIT_S), live.result(WAIT_S)) == (1, 64)
    assert 7 not in [n for batch in runner.batches for n in batch]
    assert batcher.queue.stats.expired == 1


def test_a_cancelled_entry_never_reaches_the_device(batcher, runner):
    occupy(batcher, runner)
    (gone,) = batcher.submit([7])
    (stays,) = batcher.submit([8])
    assert gone.cancel()
    runner.gate.set()
    assert stays.result(WAIT_S) == 64
    assert 7 not in [n for batch in runner.batches for n in batch]
    assert batcher.queue.stats.cancelled == 1


def test_cancelling_one_caller_on_the_device_leaves_its_batch_mates_alone(batcher, runner):
    occupy(batcher, runner)
    futures = batcher.submit([2, 3, 4])
    runner.entered.clear()
    runner.gate.set()
    # Whether the batch runs already or not, the others are answered.
    futures[1].cancel()
    assert futures[0].result(WAIT_S) == 4
    assert futures[2].result(WAIT_S) == 16
    assert batcher.submit([5])[0].result(WAIT_S) == 25


def test_a_caller_gone_during_the_run_is_not_completed_twice(batcher, runner):
    first = occupy(batcher, runner)
    assert first.cancel()  # it is on the device right now
    runner.gate.set()
    assert batcher.submit([6])[0].result(WAIT_S) == 36
    assert first.cancelled()


def test_poison_fails_alone_and_the_thread_lives(batcher, runner):
    occupy(batcher, runner)
    futures = batcher.submit([2, None, 4, 5])
    runner.gate.set()
    assert [futures[i].result(WAIT_S) for i in (0, 2, 3)] == [4, 16, 25]
    with pytest.raises(InternalError) as caught:
        futures[1].result(WAIT_S)
    assert "NoneType" not in caught.value.message  # no internals for callers
    assert batcher.submit([9])[0].result(WAIT_S) == 81


def test_an_error_result_fails_only_its_entry():
    def run(entries):
        return [InvalidInputError("odd") if e.payload % 2 else e.payload for e in entries]

    batcher = Batcher(run, max_batch=8)
    futures = batcher.submit([2, 3, 4])
    assert (futures[0].result(WAIT_S), futures[2].result(WAIT_S)) == (2, 4)
    with pytest.raises(InvalidInputError, match="odd"):
        futures[1].result(WAIT_S)
    batcher.close()


def test_a_runner_with_too_few_results_is_an_internal_error():
    batcher = Batcher(lambda entries: [], max_batch=2)
    with pytest.raises(InternalError, match="0 results for 1"):
        batcher.submit([1])[0].result(WAIT_S)
    batcher.close()


def test_close_answers_what_waits_and_refuses_more(batcher, runner):
    running = occupy(batcher, runner)
    (waiting,) = batcher.submit([2])
    closer = threading.Thread(target=batcher.close)
    closer.start()
    with pytest.raises(UnavailableError):
        waiting.result(WAIT_S)
    runner.gate.set()
    closer.join(WAIT_S)
    assert running.result(WAIT_S) == 1
    with pytest.raises(UnavailableError):
        batcher.submit([3])


def test_take_respects_the_cost_of_a_batch_but_always_takes_one():
    queue = RequestQueue()
    entries = [Entry(n, cost=c) for n, c in enumerate([50, 30, 30, 5])]
    queue.put(entries)
    assert [e.payload for e in queue.take(max_entries=8, max_cost=40)] == [0]
    assert [e.payload for e in queue.take(max_entries=8, max_cost=40)] == [1, 3]
    assert [e.payload for e in queue.take(max_entries=8, max_cost=40)] == [2]
    assert queue.take(max_entries=8, block=False) == []
    assert queue.queued_cost == 0


def test_no_more_run_together_than_the_group_allows():
    """Else a few long documents would be several device runs in a row that no query can part."""
    queue = RequestQueue()
    queue.put([Entry(n, group="long", max_batch=2) for n in range(3)])
    queue.put([Entry(n, group="short", max_batch=16) for n in range(10, 15)])
    batches = [[e.payload for e in queue.take(max_entries=4)] for _ in range(4)]
    assert batches == [[0, 1], [2], [10, 11, 12, 13], [14]]


def document(n: int, **values) -> Entry:
    return Entry(n, background=True, **values)


def test_a_query_passes_the_documents_that_wait():
    queue = RequestQueue()
    queue.put([document(n) for n in range(100)])
    queue.put([Entry("query")])
    # Alone: its batch holds no documents, for whose rows it would have to wait.
    assert [e.payload for e in queue.take(max_entries=8)] == ["query"]
    assert [e.payload for e in queue.take(max_entries=2)] == [0, 1]
    assert len(queue) == queue.queued_cost == 98


def test_documents_get_their_turn_while_queries_keep_coming():
    queue = RequestQueue()
    queue.put([document(n, group=n % 2) for n in range(4)])
    order = []
    for n in range(100, 116):
        queue.put([Entry(n), Entry(n)])
        order += [e.payload for e in queue.take(max_entries=1)]
    turns = QUERY_TURNS + 1
    assert [n for n in order if n < 100] == [0, 1, 2, 3]
    assert order[turns - 1 :: turns] == [0, 1, 2, 3]


def test_a_lane_full_of_documents_still_admits_queries():
    queue = RequestQueue(max_entries=4, max_cost=100)
    queue.put([document(n, cost=25) for n in range(4)])
    with pytest.raises(OverloadedError):
        queue.put([document(9)])
    queue.put([Entry("query", cost=100)])
    with pytest.raises(OverloadedError):
        queue.put([Entry("another")])
    assert [e.payload for e in queue.take(max_entries=8)] == ["query"]
    queue.put([Entry("another"), Entry("third")])
    # All or nothing across the lanes too.
    with pytest.raises(OverloadedError):
        queue.put([Entry("fourth"), document(9)])
    assert [e.payload for e in queue.take(max_entries=8)] == ["another", "third"]
    assert [e.payload for e in queue.close()] == [0, 1, 2, 3]
    assert len(queue) == queue.queued_cost == 0


def test_complete_reports_who_was_first():
    entry = Entry(1)
    assert complete(entry.future, result=1)
    assert not complete(entry.future, error=InternalError("late"))
    assert entry.future.result() == 1
