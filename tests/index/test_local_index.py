from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from tests.index.documents import make_entry, random_units, unit
from tte_jax.errors import DeadlineExceededError
from tte_jax.filters import Equals
from tte_jax.index import CorpusIndex, LocalIndex
from tte_jax.stages import IndexStage


@pytest.fixture
async def stage(tmp_path):
    stage = LocalIndex(CorpusIndex.open(tmp_path), readers=2)
    yield stage
    await stage.close()


async def test_the_stage_protocol(stage):
    as_stage: IndexStage = stage
    entries = [make_entry("a", unit(1, 0), metadata={"n": 1}), make_entry("b", unit(0, 1))]
    assert await as_stage.upsert(entries) == 2
    hits, usage = await as_stage.search(unit(1, 0.1), k=2)
    assert [h.id for h in hits] == ["a", "b"]
    assert usage.stage == "index"
    assert usage.queue_s >= 0.0 < usage.compute_s
    hits, _ = await as_stage.search(unit(0, 1), k=2, filter=Equals("n", 1), timeout_s=30)
    assert [h.id for h in hits] == ["a"]
    assert await as_stage.delete(["b", "c"]) == (["b"], ["c"])
    assert [d and d.id for d in await as_stage.get(["a", "b"])] == ["a", None]
    assert set(await stage.existing(["a", "b"])) == {"a"}
    assert (await stage.fetch(["b", "a"], omit_media=True))[1].document.id == "a"
    assert (await stage.stats()).documents == 1


async def test_a_call_whose_deadline_passes_in_the_queue_is_never_run(stage):
    go_on = threading.Event()
    blocked = asyncio.ensure_future(stage._run(stage._writer, lambda: go_on.wait(30), None))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceededError):
        await stage.upsert([make_entry("a", unit(1, 0))], timeout_s=0.02)
    with pytest.raises(DeadlineExceededError):
        await stage.search(unit(1, 0), k=1, timeout_s=0.0)
    go_on.set()
    assert await blocked
    await stage.upsert([make_entry("b", unit(1, 0))])
    assert [h.id for h in (await stage.search(unit(1, 0), k=5))[0]] == ["b"]


async def test_readers_are_not_blocked_by_writers(stage):
    await stage.upsert([make_entry("a", unit(1, 0))])
    go_on = threading.Event()
    with stage.index._write_lock:
        writing = asyncio.ensure_future(stage.upsert([make_entry("b", unit(1, 0))]))
        hits, _ = await stage.search(unit(1, 0), k=5, timeout_s=30)
        assert [h.id for h in hits] == ["a"]
        assert (await stage.get(["a"], timeout_s=30))[0] is not None
        go_on.set()
    await writing


async def test_searches_beside_writes_and_rebuilds(stage):
    vectors = random_units(np.random.default_rng(0), 120, 8)
    await stage.upsert([make_entry(f"d{i:03d}", vectors[i]) for i in range(60)])

    async def write():
        for start in range(60, 120, 4):
            ids = range(start, start + 4)
            await stage.upsert([make_entry(f"d{i:03d}", vectors[i]) for i in ids])
            await stage.delete([f"d{i - 60:03d}" for i in ids])

    async def search():
        for i in list(range(120)) * 2:
            hits, _ = await stage.search(vectors[i], k=10)
            assert [h.cosine for h in hits] == sorted((h.cosine for h in hits), reverse=True)
            assert len({h.id for h in hits}) == len(hits) == 10

    async def rebuild():
        for _ in range(10):
            await stage.rebuild()
            await stage.snapshot()

    await asyncio.gather(write(), search(), search(), rebuild())
    assert {h.id for h in (await stage.search(vectors[0], k=999))[0]} == {
        f"d{i:03d}" for i in range(60, 120)
    }
    assert stage.index.verify() == []
