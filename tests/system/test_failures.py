"""Services killed in the middle of their work: what the user still gets, and what is never lost."""

from __future__ import annotations

import os
import signal
import threading

from tests.system import running
from tests.system.running import System, query
from tte_jax.cascade import IngestOptions, SearchStage, SearchUpdate
from tte_jax.client import Client

SEARCHERS = 3


class Load:
    """Searches over and over on some threads; `answers` and `errors` hold what came of it."""

    def __init__(self, client: Client) -> None:
        self.answers: list[SearchUpdate] = []
        self.errors: list[BaseException] = []
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=[n]) for n in range(SEARCHERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(running.PATIENCE_S)
        assert not any(thread.is_alive() for thread in self._threads), "a search hangs"

    def wait_for(self, count: int, stage: SearchStage) -> None:
        """Until `count` more searches have ended at this stage."""
        start = len(self.answers)
        running.until(
            lambda: self.errors or sum(a.stage is stage for a in self.answers[start:]) >= count,
            f"{count} answers that are {stage}",
        )

    def _work(self, number: int) -> None:
        asked = 0
        while not self._stop.is_set():
            asked += 1
            words = f"{running.COLOURS[asked % 4]} {running.THINGS[(asked + number) % 4]}"
            try:
                self.answers.append(self._client.search_final(query(words)))
            except BaseException as error:
                self.errors.append(error)
                return


def test_without_its_reranker_a_search_is_degraded_and_later_whole_again(
    system: System, client: Client
) -> None:
    before = system.state.service("reranker")
    others = {name: pid for name, pid in system.pids.items() if name != "reranker"}
    with Load(client) as load:
        load.wait_for(5, SearchStage.RERANKED)
        os.kill(before.pid, signal.SIGKILL)
        load.wait_for(5, SearchStage.FIRST_STAGE)
        system.await_restart("reranker", before.pid)
        load.wait_for(5, SearchStage.RERANKED)
    assert not load.errors, load.errors
    degraded = [answer for answer in load.answers if answer.stage is SearchStage.FIRST_STAGE]
    for answer in degraded:
        assert answer.final and answer.results  # the first stage's ranking is never lost
        assert {d.stage for d in answer.degraded} == {"rerank"}
        assert all(d.reason and d.message for d in answer.degraded)
        assert all(candidate.rerank is None for candidate in answer.results)
    after = system.state
    assert after.service("reranker").restarts == before.restarts + 1
    assert {s.name: s.pid for s in after.services if s.name != "reranker"} == others
    system.assert_healthy()


def test_what_was_acknowledged_survives_the_index_being_killed(
    system: System, client: Client
) -> None:
    documents = running.documents(120, prefix="survivor")
    given = {document.id: document for document in documents}
    index = system.state.service("index")
    acknowledged: list[str] = []
    killed = False
    # Long enough for the restart: the stream waits for the index and goes on.
    options = IngestOptions(reasoning_tokens=4, patience_s=running.PATIENCE_S)
    for update in client.ingest(documents, options, timeout_s=running.PATIENCE_S):
        acknowledged += [result.id for result in update.results if result.error is None]
        if not killed and len(acknowledged) >= 20:
            before_kill = list(acknowledged)
            os.kill(index.pid, signal.SIGKILL)
            killed = True
    assert killed and len(before_kill) < len(documents)
    assert sorted(acknowledged) == sorted(given)

    system.await_restart("index", index.pid)
    for id in acknowledged:
        stored = client.get_document(id, timeout_s=60.0)
        assert stored.content == given[id].content and stored.metadata == given[id].metadata
    system.assert_healthy()
    # Nothing is left to do for the same documents.
    *_, again = client.ingest(documents, options, timeout_s=running.PATIENCE_S)
    assert (again.skipped, again.failed) == (len(documents), 0)
    deleted, unknown = client.delete_documents(list(given), timeout_s=60.0)
    assert sorted(deleted) == sorted(given) and not unknown


def test_a_reranker_that_hangs_costs_its_stage_and_no_more(system: System, client: Client) -> None:
    """Stopped, not dead: its connection stays open and nothing comes back."""
    pid = system.state.service("reranker").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        answer = client.search_final(query("a hanging cat", deadline_s=8.0))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answer.final and answer.results and answer.stage is SearchStage.FIRST_STAGE
    assert {d.stage for d in answer.degraded} == {"rerank"}

    def whole() -> bool:
        found = client.search_final(query("a cat that goes on", deadline_s=60.0))
        return found.stage is SearchStage.RERANKED and not found.degraded

    running.until(whole, "a whole search")
    assert system.state.service("reranker").pid == pid
    system.assert_healthy()
