"""Jobs beside serving, with work that never ends."""

from __future__ import annotations

import threading

from tte_jax.index.maintenance import Job, Maintenance


def test_a_job_that_is_always_due_again_holds_up_no_other() -> None:
    ran: list[str] = []
    enough = threading.Event()

    def check() -> None:
        ran.append("check")
        if len(ran) > 50:
            enough.set()

    waiting = {"rebuild": 2, "snapshot": 1}

    def work(name: str) -> Job:
        def run() -> None:
            ran.append(name)
            waiting[name] -= 1

        return Job(name, lambda: waiting[name] > 0, run)

    # Searches go on, so that a check is due as soon as it has begun.
    always = Job("check", lambda: not enough.is_set(), check)
    maintenance = Maintenance([work("rebuild"), always, work("snapshot")])
    maintenance.poke()
    maintenance.join(30)
    assert ran[:5] == ["rebuild", "check", "snapshot", "rebuild", "check"]
    assert waiting == {"rebuild": 0, "snapshot": 0}
    assert maintenance.last_error == ""


def test_what_is_always_due_can_be_stopped() -> None:
    begun = threading.Event()
    maintenance = Maintenance([Job("check", lambda: True, begun.set)])
    maintenance.poke()
    assert begun.wait(30)
    maintenance.stop(timeout_s=30)
    assert maintenance.stopped
    maintenance.join(0)
    assert maintenance._thread is not None and not maintenance._thread.is_alive()
