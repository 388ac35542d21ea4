"""SIGTERM to the supervisor under load: no orphan, no port held, and a second start goes on."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from tests.system import running
from tests.system.running import alive, documents, query
from tte_jax import system_state
from tte_jax.cascade import IngestOptions
from tte_jax.errors import TteError


def test_sigterm_ends_everything(tmp_path: Path) -> None:
    with running.system(tmp_path / "data") as system:
        state = system.state
        options = IngestOptions(reasoning_tokens=4)
        with system.client() as client:
            *_, last = client.ingest(documents(6), options, timeout_s=120.0)
            assert last.stored == 6

            outcomes: list[object] = []

            def search() -> None:
                try:
                    while True:
                        outcomes.append(
                            client.search_final(query("red cat", deadline_s=20.0)).final
                        )
                except TteError as error:
                    outcomes.append(error.code)

            searcher = threading.Thread(target=search)
            searcher.start()
            running.until(lambda: len(outcomes) >= 2, "searches")
            system.process.terminate()
            code = system.process.wait(running.PATIENCE_S)
            searcher.join(running.PATIENCE_S)

        assert code == 0, system.said()
        assert "Traceback" not in system.said()
        # A running search got its answer; the next was refused, not broken off.
        assert outcomes[:-1] == [True] * (len(outcomes) - 1) and outcomes[-1] == "UNAVAILABLE"
        assert not any(alive(service.pid) for service in state.services)
        assert system_state.read(system.data_dir) is None
        for service in state.services:
            for address in (service.address, service.metrics.split("/")[2]):
                host, _, port = address.rpartition(":")
                with socket.socket() as again:
                    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    again.bind((host, int(port)))
                    again.listen()
