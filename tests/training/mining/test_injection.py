"""Duplicates under new keys: the filter keeps them out, and without it they are negatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.training.mining.hand import HandEmbedder, HandReranker, example_rows, reranker_service
from tests.training.test_data_sources import write_jsonl
from training.data.examples import Example
from training.data.jsonl import JsonlSource
from training.mining import candidates, injection, miner, table
from training.mining.embeddings import embed
from training.mining.records import RERANKER, Rules
from training.mining.rounds import Round, RoundWriter
from tte_jax.client import NegativeMiner
from tte_jax.errors import InvalidInputError


async def test_duplicates_are_kept_out_by_the_filter_alone(tmp_path):
    # Queries of three different words: at most three documents, and their copies, have all three.
    rows = [row for row in example_rows(36) if len(set(row["query"].split())) == 3]
    source = JsonlSource(write_jsonl(tmp_path / "b.jsonl", rows))
    before = table.table_of(source)
    injected = injection.WithDuplicates(source, before, copy=injection.renamed, share=0.25, seed=1)
    assert len(injected.originals) == 3
    made = table.table_of(injected)
    # A duplicate is a document of its original's data set, and right for nobody as far as known.
    assert len(made.documents) == 12 + 3
    for document in made.documents:
        if document.key in injected.originals:
            twin = next(d for d in before.documents if d.key == injected.originals[document.key])
            assert document.dataset == twin.dataset and document.groups == ()
            assert not any(
                made.is_right(q, i)
                for q in made.queries
                for i, d in enumerate(made.documents)
                if d is document
            )
    stage = HandEmbedder(np.eye(26, dtype=np.float32))
    queries, documents, version = await embed(made, injected, stage, tmp_path / "v")
    rules = Rules(arm=RERANKER, negatives=6, depth=25)
    found, cosines = candidates.nearest(made, queries, documents, count=rules.depth)
    async with reranker_service(HandReranker()) as address:
        client = NegativeMiner(address)
        header = miner.header(made, rules, embedder=version, reranker="hand@1")
        with RoundWriter(tmp_path / "rounds", 0, header) as writer:
            await miner.mine(made, found, cosines, rules, writer, miner=client, version="hand@1")
            round = Round(writer.seal())
        await client.close()
    figures = injection.count(made, found, round, injected.originals, percents=(0.5,))
    assert figures["pairs"] == figures["candidates"] == 3
    arms = figures["arms"]
    assert isinstance(arms, dict)
    assert arms["reranker"]["duplicates"] == 0 and arms["reranker"]["kept_out"] == 1.0
    # A duplicate scores 1 as its original does, so without the filter it is among the hardest.
    assert arms["reranker-unfiltered"]["duplicates"] == 3
    assert arms["embedder"]["duplicates"] > 0
    # Two words of three are 0.67: half of the positive's score drops these, too.
    stricter = arms["reranker, t = 0.5"]
    assert stricter["duplicates"] == 0 and stricter["dropped"] > arms["reranker"]["dropped"]
    assert arms["embedder"]["dropped"] == 0.0
    two = injection.count(made, found, round, injected.originals, negatives=2)["arms"]
    assert isinstance(two, dict) and two["embedder"]["negatives"] == 2 * len(made.queries)
    with pytest.raises(InvalidInputError, match="percents"):
        injection.count(made, found, round, injected.originals, percents=(1.5,))


async def test_right_answers_that_mining_was_not_told_of_are_counted(tmp_path):
    rows = [
        {"key": str(i), "query": "red owl", "positives": [f"red owl {name}"], "group": "owl"}
        for i, name in enumerate(("one", "two"))
    ]
    rows += [
        {"key": f"x{i}", "query": f"blue {w}", "positives": [f"blue {w}"], "group": w}
        for i, w in enumerate(("crow", "dove", "wren"))
    ]
    source = JsonlSource(write_jsonl(tmp_path / "g.jsonl", rows))
    groups = {d.key: d.groups[0] for d in table.table_of(source).documents}

    class Ungrouped:
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> Example:
            if index >= len(source):
                raise IndexError
            return replace(source[index], group="")

        def __iter__(self) -> Iterator[Example]:
            return (self[i] for i in range(len(self)))

    made = table.table_of(Ungrouped())
    stage = HandEmbedder(np.eye(26, dtype=np.float32))
    queries, documents, version = await embed(made, Ungrouped(), stage, tmp_path / "v")
    rules = Rules(arm=RERANKER, negatives=2, depth=5)
    found, cosines = candidates.nearest(made, queries, documents, count=5)
    async with reranker_service(HandReranker()) as address:
        client = NegativeMiner(address)
        header = miner.header(made, rules, embedder=version, reranker="hand@1")
        with RoundWriter(tmp_path / "rounds", 0, header) as writer:
            await miner.mine(made, found, cosines, rules, writer, miner=client, version="hand@1")
            round = Round(writer.seal())
        await client.close()
    arms = injection.count(made, found, round, {}, groups)["arms"]
    assert isinstance(arms, dict)
    assert arms["reranker"]["same_group"] == 0
    assert arms["reranker-unfiltered"]["same_group"] == 2
    assert arms["embedder"]["same_group"] == 2


def test_what_cannot_be_injected(tmp_path):
    source = JsonlSource(write_jsonl(tmp_path / "b.jsonl", example_rows(10)))
    made = table.table_of(source)
    with pytest.raises(InvalidInputError, match="share"):
        injection.WithDuplicates(source, made, copy=injection.renamed, share=0.0)
    with pytest.raises(InvalidInputError, match="key"):
        injection.WithDuplicates(source, made, copy=lambda d: d, share=0.5)
