"""A run that was stopped goes on to the same bits, from a model directory alone."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.drawings import written
from training.builtin import unified
from training.builtin.pairs import Mix
from training.builtin.unified import Config
from training.stopping import StopRequest
from tte_jax.builtin.models import REASONER, path_of
from tte_jax.embedder import Embedder

pytestmark = pytest.mark.training_runs

STEPS = 4


class StopsAfter(StopRequest):
    """As if SIGTERM came in the second step."""

    steps = 0

    def asked(self) -> bool:
        self.steps += 1
        if self.steps == 2:
            self._remember(signal.SIGTERM, None)
        return super().asked()


def weights(out: Path) -> bytes:
    return (out / "export/model.safetensors").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Config(
        data=written(tmp_path / "data"),
        start=path_of(REASONER),
        out=tmp_path / "whole",
        mix=Mix(text=4, image=2, composed=4, coined=2, rows=12, learnt=400),
        steps=STEPS,
        warmup=1,
    )
    unified.main(whole)
    halves = replace(whole, out=tmp_path / "halves")
    with monkeypatch.context() as patched:
        patched.setattr(unified, "StopRequest", StopsAfter)
        with pytest.raises(SystemExit) as left:
            unified.main(halves)
    assert left.value.code == 128 + signal.SIGTERM
    assert not (halves.out / "export").exists()
    unified.main(halves)
    assert weights(halves.out) == weights(whole.out)
    assert weights(whole.out) != (path_of(REASONER) / "model.safetensors").read_bytes()
    # What comes out is a whole directory, like the one that it began with.
    with Embedder.from_pretrained(whole.out / "export") as embedder:
        assert embedder.version != Embedder.from_pretrained(path_of(REASONER)).version
