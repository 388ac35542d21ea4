"""Every arm of one mining, from sealed rounds; and mining that is not told the groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.training.mining.hand import HandEmbedder, HandReranker, example_rows, reranker_service
from tests.training.test_data_sources import write_jsonl
from training.data.jsonl import JsonlSource
from training.data.rows import ExampleSource
from training.mining import arms, candidates, miner, table
from training.mining.embeddings import embed
from training.mining.records import RERANKER, Rules
from training.mining.rounds import Round, RoundWriter, sealed
from training.mining.ungrouped import Ungrouped
from tte_jax.client import NegativeMiner


def keys(source: ExampleSource, index: int) -> list[str]:
    return [one.key for one in source[index].negatives]


async def test_one_mining_serves_every_arm(tmp_path: Path) -> None:
    source = JsonlSource(write_jsonl(tmp_path / "birds.jsonl", example_rows(30)))
    made = table.table_of(source)
    stage = HandEmbedder(np.eye(26, dtype=np.float32))
    queries, documents, version = await embed(made, source, stage, tmp_path / "v")
    rules = Rules(arm=RERANKER, negatives=3, depth=12)
    found, cosines = candidates.nearest(made, queries, documents, count=rules.depth)
    async with reranker_service(HandReranker()) as address:
        client = NegativeMiner(address)
        header = miner.header(made, rules, embedder=version, reranker="hand@1")
        with RoundWriter(tmp_path / "rounds", 0, header) as writer:
            await miner.mine(made, found, cosines, rules, writer, miner=client, version="hand@1")
            mined = Round(writer.seal())
        await client.close()
    folder = tmp_path / "arms"
    every = await arms.sources(source, made, found, cosines, mined, folder)
    assert tuple(every) == arms.IN_ORDER
    different = set()
    for index, query in enumerate(made.queries):
        record = mined[index]
        near = [made.documents[i].key for i in miner.allowed(made, query, found[index])]
        assert keys(every["none"], index) == []
        assert keys(every["embedder"], index) == near[:3]
        assert keys(every["reranker"], index) == [one.key for one in record.negatives]
        everything = [one.key for one in (*record.false_negatives, *record.negatives)]
        assert keys(every["reranker-unfiltered"], index) == everything[:3]
        drawn = keys(every["random"], index)
        assert len(set(drawn)) == 3 and not {made.documents[i].key for i in query.positives} & set(
            drawn
        )
        different |= {arm for arm in every if keys(every[arm], index) != keys(every["none"], index)}
    assert different == set(arms.IN_ORDER[1:])
    # A second call reads the rounds that the first one sealed.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    await arms.sources(source, made, found, cosines, mined, folder)
    assert sealed(folder / "random") == [0]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")} == before


def test_groups_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        {"key": str(i), "query": f"owl {i}", "positives": [f"an owl {i}"], "group": "owl"}
        for i in range(3)
    ]
    source = JsonlSource(write_jsonl(tmp_path / "owls.jsonl", rows))
    told, untold = table.table_of(source), table.table_of(Ungrouped(source))
    assert told.is_right(told.queries[0], 1) and not untold.is_right(untold.queries[0], 1)
    assert [d.key for d in told.documents] == [d.key for d in untold.documents]
    assert Ungrouped(source).document(2, 0) == source.document(2, 0)
