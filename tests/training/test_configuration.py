"""How a command of `training` ends."""

from __future__ import annotations

import os
import signal
import time

import pytest

from training.configuration import ended
from tte_jax.cli import exits
from tte_jax.errors import InvalidInputError, UnavailableError


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_an_error_is_told_in_a_line_and_decides_the_code(capsys) -> None:
    assert ended(lambda: None) == exits.OK
    wrong = InvalidInputError("--rounds 0 is less than 1", field="rounds")
    assert ended(raising(wrong)) == exits.exit_code(wrong)
    assert capsys.readouterr().err == "Error: --rounds 0 is less than 1\n"
    away = UnavailableError("no reranker at 127.0.0.1:1")
    assert ended(raising(away)) == exits.exit_code(away)
    assert capsys.readouterr().err.splitlines() == [
        "Error: no reranker at 127.0.0.1:1",
        "Run the same command again once that is mended.",
    ]
    assert ended(raising(KeyboardInterrupt())) == exits.exit_code(KeyboardInterrupt())
    assert capsys.readouterr().err == "Error: interrupted\n"


def test_sigterm_unwinds_the_work_and_is_as_before_afterwards() -> None:
    before, unwound = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as left:
        ended(work)
    assert left.value.code == 128 + signal.SIGTERM
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) == before
