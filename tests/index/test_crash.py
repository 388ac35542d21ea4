"""`kill -9` at random moments: what was acknowledged is there, what was deleted is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.index.crash_writer import image_of, vector_of
from tte_jax.corpus.records import Stored
from tte_jax.index import CorpusIndex

WRITER = Path(__file__).with_name("crash_writer.py")
ROOT = WRITER.parents[2]


def _apply(model: dict[str, int], operation: dict) -> dict[str, int]:
    after = dict(model)
    for id in operation.get("upsert", ()):
        after[id] = operation["version"]
    for id in operation.get("delete", ()):
        after.pop(id, None)
    return after


def test_acknowledged_writes_survive_kill_9(tmp_path):
    choose = random.Random(0)
    model: dict[str, int] = {}
    acknowledged = 0
    for round in range(10):
        writer = subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path), str(round)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None and writer.stderr is not None
        # Any line may be the last: before an acknowledgement as well as after one.
        lines = [writer.stdout.readline() for _ in range(choose.randint(1, 40))]
        writer.send_signal(signal.SIGKILL)
        rest, errors = writer.stdout.read(), writer.stderr.read()
        writer.wait(30)
        assert all(lines), errors
        pending: dict = {}
        for line in [*lines, *rest.splitlines(keepends=True)]:
            if not line.endswith("\n"):
                break
            said = json.loads(line)
            if said["say"] == "try":
                pending = said
            else:
                model = _apply(model, pending)
                pending = {}
                acknowledged += 1

        # The lock died with its holder, so the corpus opens at once.
        index = CorpusIndex.open(tmp_path)
        assert index.verify() == []
        hits = index.search(vector_of(1), 1000)
        stored = {hit.id: int(hit.metadata["version"]) for hit in hits}
        # A write that was under way is there as a whole or not at all.
        assert stored in (model, _apply(model, pending))
        model = stored
        for document in index.get(sorted(model)):
            assert document is not None
            assert document.content.media[0].data == image_of(model[document.id])
        for change in index.store.changes_since(0):
            if isinstance(change, Stored):
                np.testing.assert_array_equal(change.vector, vector_of(model[change.id]))
        index.close()
    assert acknowledged > 30
    assert model
