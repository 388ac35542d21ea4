"""`kill -9` at random moments: what was acknowledged is there, what was deleted is not.

TTE_CRASH_ROUNDS says how often (`make crash`: 200 times).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.index.crash_promoter import IDS, edition_of, name_of, step_of
from tests.index.crash_promoter import vector_of as vector_of_embedder
from tests.index.crash_writer import WRITERS, image_of, vector_of
from tte_jax.content import Media
from tte_jax.corpus.records import Stored
from tte_jax.index import CorpusIndex

ROUNDS = int(os.environ.get("TTE_CRASH_ROUNDS", "10"))
WRITER = Path(__file__).with_name("crash_writer.py")
PROMOTER = WRITER.with_name("crash_promoter.py")
ROOT = WRITER.parents[2]


def _apply(model: dict[str, int], operation: dict) -> dict[str, int]:
    after = dict(model)
    for id in operation.get("upsert", ()):
        after[id] = operation["version"]
    for id in operation.get("delete", ()):
        after.pop(id, None)
    return after


@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_acknowledged_writes_survive_kill_9(tmp_path):
    choose = random.Random(0)
    model: dict[str, int] = {}
    acknowledged = 0
    for round in range(ROUNDS):
        writer = subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path), str(round)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None and writer.stderr is not None
        # Any line may be the last: before an acknowledgement as well as after one.
        lines = [writer.stdout.readline() for _ in range(choose.randint(1, 80))]
        writer.send_signal(signal.SIGKILL)
        rest, errors = writer.stdout.read(), writer.stderr.read()
        writer.wait(30)
        assert all(lines), errors
        pending: dict[str, dict] = {name: {} for name in WRITERS}
        for line in [*lines, *rest.splitlines(keepends=True)]:
            if not line.endswith("\n"):
                break
            said = json.loads(line)
            assert said["say"] != "problem", said
            if said["say"] == "try":
                pending[said["who"]] = said
            else:
                model = _apply(model, pending[said["who"]])
                pending[said["who"]] = {}
                acknowledged += 1

        # The lock died with its holder, so the corpus opens at once.
        index = CorpusIndex.open(tmp_path)
        assert index.verify() == []
        hits = index.search(vector_of(1), 1000)
        stored = {hit.id: int(hit.metadata["version"]) for hit in hits}
        for name in WRITERS:
            # A write that was under way is there as a whole or not at all.
            now, before = _of(name, stored), _of(name, model)
            assert now in (before, _of(name, _apply(model, pending[name]))), (round, name)
        model = stored
        for document in index.get(sorted(model)):
            assert document is not None
            assert document.content.media[0].data == image_of(model[document.id])
        for change in index.store.changes_since(0):
            if isinstance(change, Stored):
                np.testing.assert_array_equal(change.vector, vector_of(model[change.id]))
        index.maintenance.join(30)
        named = {Media(image_of(version)).sha256 for version in model.values()}
        assert set(index.media.keys()) == named, "files that no document names"
        index.close()
    assert acknowledged > 3 * ROUNDS
    assert model


@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_a_promotion_killed_at_any_moment_is_whole_or_has_not_been(tmp_path):
    choose = random.Random(1)
    promoted = 1
    for round in range(ROUNDS):
        with subprocess.Popen(
            [sys.executable, str(PROMOTER), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as promoter:
            assert promoter.stdout is not None and promoter.stderr is not None
            lines = [promoter.stdout.readline() for _ in range(choose.randint(2, 8))]
            time.sleep(choose.random() * 0.1)  # a line comes before a promotion or after it
            promoter.send_signal(signal.SIGKILL)
            rest, errors = promoter.stdout.read(), promoter.stderr.read()
        assert all(lines), errors
        tried = promoted
        for said in map(json.loads, [*lines, *rest.splitlines()]):
            assert said["say"] != "problem", said
            if said["say"] == "try":
                tried = said["step"]
            elif said["say"] == "ack":
                promoted = said["step"]

        index = CorpusIndex.open(tmp_path)
        assert index.verify() == []
        step = step_of(index.stats().embedder_version)
        assert step in (promoted, tried), (round, step, promoted, tried)
        promoted = step
        vectors = {
            change.id: (change.vector, vector_of_embedder(change.id, edition, step))
            for change in index.store.changes_since(0)
            if isinstance(change, Stored)
            for edition in [edition_of(change.metadata)]
        }
        assert sorted(vectors) == list(IDS)
        for stored, expected in vectors.values():
            np.testing.assert_array_equal(stored, expected)
        hits = index.search(vector_of_embedder(IDS[3], 0, step), 99, embedder_version=name_of(step))
        assert len(hits) == len(IDS)
        # What was staged is kept: the next process goes on with it.
        staged = index.stats().staged_embedder_version
        assert staged in ("", name_of(step + 1))
        index.close()
    assert promoted > ROUNDS // 2


def _of(name: str, model: dict[str, int]) -> dict[str, int]:
    return {id: version for id, version in model.items() if id.startswith(name)}
