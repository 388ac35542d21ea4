"""Starting the services, and the built-in corpus: once, resumed, and made again when it must be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from servers.settings import DEFAULT_PORTS
from tests.cli.conftest import Tte
from tests.cli.system import System
from tte_jax import system_state
from tte_jax.cli import connection, corpus, launch, state
from tte_jax.cli.output import Output
from tte_jax.errors import InvalidInputError, PreconditionError

MODELS = {"reasoner": "reasoner-1", "embedder": "embedder-1"}
NOTHING = corpus.Stored(0, "")


def ensure(system: System, folder: Path, stored: corpus.Stored, **models: str) -> corpus.Ingested:
    with connection.connect(system.addresses["gateway"]) as client:
        return corpus.ensure(
            client,
            data_dir=folder,
            models={**MODELS, **models},
            stored=stored,
            out=Output(json=True),
        )


def test_the_corpus_is_ingested_once_and_resumed(system: System, tmp_path: Path, few: int) -> None:
    first = ensure(system, tmp_path, NOTHING)
    assert (first.documents, first.cached) == (few, False)
    again = ensure(system, tmp_path, corpus.Stored(few, "embedder-1"))
    assert again.cached
    # An interrupted ingest leaves no note: everything is sent again, and nothing is done again.
    resumed = ensure(system, tmp_path / "other", corpus.Stored(few - 1, "embedder-1"))
    assert (resumed.cached, resumed.stored) == (False, 0)
    # A lost corpus is not believed to be there because of the note.
    lost = ensure(system, tmp_path, NOTHING)
    assert not lost.cached


def test_another_embedder_makes_the_corpus_again(system: System, tmp_path: Path, few: int) -> None:
    ensure(system, tmp_path, NOTHING)
    made = ensure(system, tmp_path, corpus.Stored(few, "embedder-0"), reasoner="reasoner-2")
    assert (made.cached, made.stored) == (False, few)


def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = [f"--port={port - (DEFAULT_PORTS['index'] - DEFAULT_PORTS['gateway'])}"]
        with (
            pytest.raises(InvalidInputError, match=f"port {port}") as caught,
            launch.services(tmp_path, wait_s=60, out=Output(), flags=flags),
        ):
            pass
    assert caught.value.reason == "PORT_IN_USE"
    assert system_state.read(tmp_path) is None, "nothing is left running"


def test_a_data_directory_serves_one_system(tte: Tte, tmp_path: Path) -> None:
    one = system_state.ServiceState("gateway", "serving", "127.0.0.1:9")
    with system_state.lock(tmp_path):
        system_state.write(tmp_path, system_state.SystemState(os.getpid(), True, (one,)))
        with (
            pytest.raises(PreconditionError, match=r"running already.*127\.0\.0\.1:9"),
            launch.services(tmp_path, wait_s=1, out=Output()),
        ):
            pass


def test_the_usual_ports_are_those_of_the_servers() -> None:
    expected = {name: f"127.0.0.1:{port}" for name, port in DEFAULT_PORTS.items()}
    assert expected == state.USUAL_ADDRESSES


def test_models_become_flags_of_their_roles(tmp_path: Path, monkeypatch) -> None:
    for name in ("vl", "text", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    vl, text, own = (str(tmp_path / name) for name in ("vl", "text", "own"))
    monkeypatch.setenv("TTE_RERANKER_MODEL", text)
    assert launch.model_flags([vl]) == [
        f"--reasoner-model={vl}",
        f"--embedder-model={vl}",
        f"--reranker-model={text}",
    ]
    assert f"--embedder-model={own}" in launch.model_flags([vl, f"embedder={own}"])
