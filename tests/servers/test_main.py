"""`python -m servers`: exit codes, and what the supervisor shows without a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from servers import runtime
from servers.__main__ import main
from servers.status_view import StatusView
from tte_jax import system_state
from tte_jax.system_state import ServiceState, SystemState


def test_a_wrong_value_is_named_and_has_its_exit_code(capsys) -> None:
    assert main(["index", "--port=x"]) == runtime.EXIT_CONFIGURATION
    assert "--port is 'x': expected int" in capsys.readouterr().err


def test_an_unknown_service_is_refused_with_the_known_ones(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["librarian"])
    assert exit_.value.code == 2
    assert "gateway" in capsys.readouterr().err


def test_without_a_terminal_only_changes_are_said() -> None:
    output = io.StringIO()
    view = StatusView(Console(file=output))
    service = ServiceState("index", "starting", "127.0.0.1:1")
    starting = SystemState(1, False, (service,))
    serving = SystemState(1, True, (replace(service, state="serving"),))
    with view:
        for state in (starting, starting, serving, serving):
            view.show(state)
    assert output.getvalue().splitlines() == [
        "index: starting at 127.0.0.1:1",
        "index: serving at 127.0.0.1:1",
        "ready: index at 127.0.0.1:1",
    ]


def test_a_terminal_sees_a_table() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with StatusView(console) as view:
        view.show(SystemState(1, False, (ServiceState("index", "starting", "127.0.0.1:1"),)))
    assert "127.0.0.1:1" in output.getvalue() and "Ctrl-C" in output.getvalue()


def test_the_state_is_true_only_while_its_supervisor_lives(tmp_path: Path) -> None:
    state = SystemState(7, True, (ServiceState("index", "serving", "127.0.0.1:1"),))
    assert system_state.read(tmp_path) is None
    with system_state.lock(tmp_path):
        assert system_state.read(tmp_path) is None
        system_state.write(tmp_path, state)
        assert system_state.read(tmp_path) == state
        (tmp_path / "system.json").write_text('{"format": 99}')
        assert system_state.read(tmp_path) is None
        system_state.write(tmp_path, state)
    assert system_state.read(tmp_path) is None
    with pytest.raises(KeyError):
        state.service("librarian")
