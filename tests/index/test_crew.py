from __future__ import annotations

import threading

import pytest

from tte_jax.index.crew import Crew


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("parts", [0, 1, 2, 40])
def test_results_stand_in_the_order_of_their_parts(threads, parts):
    assert Crew(threads).map(lambda part: part * part, range(parts)) == [
        n * n for n in range(parts)
    ]


def test_parts_are_worked_on_side_by_side():
    both = threading.Barrier(2, timeout=30)  # passed only by two at once
    assert Crew(2).map(lambda part: both.wait() >= 0, [0, 1]) == [True, True]


def test_a_caller_does_not_wait_for_a_busy_crew():
    crew = Crew(2)
    held, release = threading.Event(), threading.Event()

    def hold(part):
        if threading.current_thread() is not first:
            held.set()
        else:
            assert held.wait(30)  # so that the other part is the other thread's
        assert release.wait(30)

    first = threading.Thread(target=lambda: crew.map(hold, [0, 1]))
    first.start()
    assert held.wait(30)  # the crew's only other thread is taken
    here = threading.get_ident()
    assert crew.map(lambda part: threading.get_ident(), range(4)) == [here] * 4
    release.set()
    first.join(30)
    assert not first.is_alive()


def test_a_failure_is_raised_when_nobody_works_any_more():
    working = []

    def work(part):
        working.append(part)
        try:
            if part == 3:
                raise ValueError("part 3")
            threading.Event().wait(0.01)
        finally:
            working.remove(part)

    crew = Crew(3)
    with pytest.raises(ValueError, match="part 3"):
        crew.map(work, range(50))
    assert working == []
    assert crew.map(lambda part: part, range(3)) == [0, 1, 2]
