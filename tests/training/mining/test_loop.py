"""The loop's folder, its trainer as a command, and a whole round with real models and services."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import compile_cache, tiny_models
from tests.training.mining import hand
from tests.training.test_data_sources import write_jsonl
from training import loop
from training.data.ecrs import PLAIN, EcrStore, WithEcrs
from training.data.jsonl import JsonlSource
from training.data.mixture import Mixture, Subset, Weighted, by_dataset
from training.data.sources import mined_round, open_source, with_option
from training.mining import candidates
from training.mining.records import EMBEDDER, Rules
from training.mining.rounds import Round, RoundWriter, sealed
from training.mining.workspace import Workspace, tree_hash
from tte_jax.errors import DataLossError, InvalidInputError, PreconditionError

pytestmark = pytest.mark.training_runs

SCRIPT = Path(__file__).with_name("trainer_script.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> loop.Config:
    """Two rounds of the embedder's arm, which need no service."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_jsonl(tmp_path / "birds.jsonl", hand.example_rows(20))
    first = hand.write_model(tmp_path / "first")
    return loop.Config(
        data=f"jsonl:{tmp_path}/birds.jsonl",
        state=tmp_path / "state",
        model=str(first),
        rules=Rules(arm=EMBEDDER, negatives=3, depth=8),
        trainer=f"{{python}} {SCRIPT} {{data}} {{model}} {{out}}",
    )


def test_a_loop_that_is_made_to_end_lets_its_trainer_save(config, monkeypatch):
    monkeypatch.setattr(loop.models, "resolve", Path)
    monkeypatch.setenv("STAGE_PAUSE", "0.1")
    command = "{python} -m tests.training.builtin.stage_script {out}.txt 2000"
    train = loop.command_trainer(replace(config, trainer=command))
    out = config.state / "model"

    def leave(number, frame):
        raise SystemExit(128 + number)

    def when_it_works():
        while not out.with_suffix(".txt.partial").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=when_it_works).start()
    with open(os.devnull) as lock, pytest.raises(SystemExit):
        try:
            train(loop.Training(0, config.state, Path("m"), out, lock.fileno()))
        finally:
            signal.signal(signal.SIGTERM, before)
    assert out.with_suffix(".txt.asked").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(out.with_suffix(".txt.pid").read_text()), 0)


async def test_a_trainer_is_a_command_that_reads_the_round(config, monkeypatch):
    # The folders are the hand models', which the loop would look for among the built-in names.
    monkeypatch.setattr(loop.models, "resolve", Path)
    last = await loop.run(config, open_embedder=hand.opener())
    assert last == config.state / "models/round-00001/export"
    made = Round(config.state / "rounds/round-00001")
    seen = json.loads((last.parent / "seen.json").read_text())
    assert seen == {r.example: [one.key for one in r.negatives] for r in made}
    first, second = (np.load(config.state / f"models/round-0000{n}/export/w.npy") for n in (0, 1))
    assert not np.array_equal(first, second)
    metrics = config.state / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["mined/negatives"] == 3.0
    assert "mined/hardness" not in rows[0], "no teacher scored"
    # What is complete is not done again, and is compared with what was made.
    hashes = tree_hash(config.state / "models")
    assert await loop.run(config, open_embedder=hand.opener()) == last
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows
    assert tree_hash(config.state / "models") == hashes
    (last / "w.npy").write_bytes(b"")
    with pytest.raises(DataLossError, match="files have changed"):
        await loop.run(config, open_embedder=hand.opener())


async def test_a_trainer_that_fails_is_run_again(config, monkeypatch):
    monkeypatch.setattr(loop.models, "resolve", Path)
    broken = replace(config, trainer=f"{config.trainer} 3")
    with pytest.raises(PreconditionError, match="code 3") as raised:
        await loop.run(broken, open_embedder=hand.opener())
    assert raised.value.reason == "TRAINER_FAILED"
    assert sealed(config.state / "rounds") == [0]
    await loop.run(config, open_embedder=hand.opener())
    assert sealed(config.state / "rounds") == [0, 1]
    nothing = replace(config, trainer="true", state=config.state.with_name("other"))
    with pytest.raises(PreconditionError, match="left no folder"):
        await loop.run(nothing, open_embedder=hand.opener())


async def test_a_retriever_that_was_not_refreshed_is_noticed(config, monkeypatch):
    """A running EmbedderService keeps its model until somebody gives it the new one."""
    monkeypatch.setattr(loop.models, "resolve", Path)
    same = hand.HandEmbedder(np.eye(26, dtype=np.float32))

    @loop.asynccontextmanager
    async def stale(model: Path):
        yield same

    with pytest.raises(PreconditionError, match="Load .*models/round-00000/export into"):
        await loop.run(config, open_embedder=stale)


async def test_other_settings_and_another_loop_are_refused(config, monkeypatch):
    space = Workspace(config.state)
    space.root.mkdir()
    space.claim({"rules": {"arm": "random"}, "seed": 0})
    space.claim({"rules": {"arm": "random"}, "seed": 0})
    with pytest.raises(PreconditionError, match="'seed': \\(0, 1\\)") as raised:
        space.claim({"rules": {"arm": "random"}, "seed": 1})
    assert raised.value.reason == "SETTINGS_CHANGED"
    with space.locked(), pytest.raises(PreconditionError) as raised:
        await loop.run(config, open_embedder=hand.opener())
    assert raised.value.reason == "LOOP_RUNNING"


def test_an_orphaned_trainer_is_waited_for(tmp_path):
    space = Workspace(tmp_path)
    with space.trainer_lock() as lock:
        orphan = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(lock,)
        )
    with space.trainer_lock():
        assert orphan.poll() == 0 or orphan.wait(1) == 0


def test_what_wraps_a_mixture_keeps_its_weights(tmp_path):
    rows = hand.example_rows(6)
    a, b = (
        JsonlSource(write_jsonl(tmp_path / f"{name}.jsonl", rows[start::2]))
        for start, name in ((0, "a"), (1, "b"))
    )
    mixture = Mixture([Weighted("a", a, 5.0), Weighted("b", b, 1.0)])
    store = EcrStore(tmp_path / "e.jsonl", arm=PLAIN, model="m", budget=1)
    store.append([])
    wrapped = by_dataset(WithEcrs(mixture, store))
    assert [(p.name, p.weight, len(p.source)) for p in wrapped.parts] == [("a", 5, 3), ("b", 1, 3)]
    assert [wrapped[i].key for i in range(6)] == ["q0", "q2", "q4", "q1", "q3", "q5"]
    turned = by_dataset(Subset(mixture, [5, 0, 4]))
    assert [(p.name, p.weight) for p in turned.parts] == [("b", 2), ("a", 1)]
    assert [turned[i].key for i in range(3)] == ["q5", "q3", "q0"]


def test_names_of_mined_sources(tmp_path):
    assert with_option("jsonl:a", "mined", "x y") == "jsonl:a?mined=x%20y"
    assert with_option("jsonl:a?first=2", "mined", "x") == "jsonl:a?first=2&mined=x"
    data = write_jsonl(tmp_path / "a.jsonl", hand.example_rows(2))
    with pytest.raises((InvalidInputError, DataLossError)):
        open_source(with_option(f"jsonl:{data}", "mined", str(tmp_path)))
    assert mined_round(f"jsonl:{data}?first=1") == ""
    with RoundWriter(tmp_path / "r s", 3, {"rules": {}}) as writer:
        sealed = writer.seal()
    name = mined_round(with_option(f"jsonl:{data}", "mined", str(sealed)))
    assert name == f"3:{Round(sealed).sha256[:16]}"


@pytest.mark.timeout(600)
async def test_a_round_with_real_models_and_a_reranker_that_is_killed(config, tmp_path):
    """Tiny checkpoints of the served families: the embedder in this process, the reranker as a
    service of the loop's own, killed in the middle; then once more, undisturbed."""
    rows = hand.example_rows(16)
    for row in rows:
        row["positives"] = [" ".join(row["positives"][0].split()[:3])]
    data = write_jsonl(tmp_path / "short.jsonl", rows)
    made = replace(
        config,
        data=f"jsonl:{data}",
        rounds=1,
        model=str(tiny_models.vl_dir()),
        reranker_model=str(tiny_models.text_dir()),
        rules=Rules(negatives=3, depth=8),
        part_records=3,
        window=2,
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compile_cache.directory()))

    async def kill_one(state: Path) -> int:
        while not list(state.glob("rounds/*.open/part-*")):
            await asyncio.sleep(0.05)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in map(int, children):
            if b"servers" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return pid
        raise AssertionError("no reranker is running")

    killer = asyncio.create_task(kill_one(made.state))
    begun = time.monotonic()
    await loop.run(made)
    assert killer.done() and killer.result() > 0
    again = replace(made, state=tmp_path / "undisturbed")
    await loop.run(again)
    first, second = (Round(c.state / "rounds/round-00000") for c in (made, again))
    assert len(first) == 16 and first.sha256 == second.sha256
    assert tree_hash(first.path) == tree_hash(second.path)
    assert first.manifest["models"]["embedder"] == tiny_models.embedder().version
    (row,) = map(json.loads, (made.state / "metrics.jsonl").read_text().splitlines())
    dropped = sum(len(r.false_negatives) for r in first)
    # A query looks at eight documents, or all of its data set if there are fewer, but for its own.
    near, _ = candidates.load(Workspace(made.state).candidates(0))
    looked_at = int((near != candidates.NONE).sum()) - 16
    share = dropped / looked_at
    assert 0 < row["mined/false_negative_share"] == pytest.approx(share, rel=1e-4)
    assert 0 < row["mined/hardness"] < 1
    scores = {n.score for r in first for n in (*r.negatives, *r.false_negatives)}
    assert len(scores) > 10
    print(f"{time.monotonic() - begun:.0f} s")
