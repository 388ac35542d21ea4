"""From data to a sealed round and back: the table, candidates, arms, false negatives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.training.mining.hand import (
    HandEmbedder,
    HandReranker,
    example_rows,
    reranker_service,
    share_of_words,
)
from tests.training.test_data_sources import write_jsonl
from training.data.ecrs import PLAIN, Ecr, EcrStore, WithEcrs, ecr_key
from training.data.jsonl import JsonlSource
from training.mining import candidates, miner, table
from training.mining.embeddings import embed
from training.mining.mined_source import MinedSource
from training.mining.records import ARMS, EMBEDDER, NONE, RANDOM, RERANKER, UNFILTERED, Rules
from training.mining.rounds import Round, RoundWriter
from training.mining.workspace import Workspace
from tte_jax.client import NegativeMiner
from tte_jax.content import Side
from tte_jax.errors import (
    DataLossError,
    InvalidInputError,
    PreconditionError,
    UnavailableError,
)
from tte_jax.index import IndexConfig


@pytest.fixture
def source(tmp_path):
    return JsonlSource(write_jsonl(tmp_path / "birds.jsonl", example_rows()))


async def embedded(source, folder, **options):
    made = table.table_of(source)
    stage = HandEmbedder(np.eye(26, dtype=np.float32))
    return made, *await embed(made, source, stage, folder, **options)


async def mined(source, folder, rules: Rules, role: HandReranker | None = None) -> Round:
    """One round of the arm, mined through the service."""
    made, queries, documents, version = await embedded(source, folder / "vectors")
    found, cosines = candidates.nearest(made, queries, documents, count=rules.depth)
    async with reranker_service(role or HandReranker()) as address:
        client = NegativeMiner(address)
        header = miner.header(made, rules, embedder=version, reranker="hand@1")
        with RoundWriter(folder / "rounds", 0, header, part_records=7) as writer:
            await miner.mine(made, found, cosines, rules, writer, miner=client, version="hand@1")
            await client.close()
            return Round(writer.seal())


def test_the_table_knows_what_is_right(tmp_path):
    rows = [
        {"key": "1", "query": "night bird", "positives": ["owl", "barn owl"], "group": "o"},
        {"key": "2", "query": "wise bird", "positives": ["tawny owl"], "negatives": ["hawk"],
         "group": "o"},
        {"key": "3", "query": {"text": "prey", "ecr": "<think>claws</think>\nAnswer: hawk"},
         "positives": ["hawk"]},
        {"key": "1", "dataset": "b", "query": "x", "positives": ["owl"]},
    ]  # fmt: skip
    source = JsonlSource(write_jsonl(tmp_path / "a.jsonl", rows))
    made = table.table_of(source)
    texts = [d.text for d in made.documents]
    # "owl" twice: candidates are of one data set, so each data set has its own.
    assert texts == ["owl", "barn owl", "tawny owl", "hawk", "owl"]
    first, second, third, _ = made.queries
    assert [made.is_right(first, i) for i in range(4)] == [True, True, True, False]
    assert [made.is_right(second, i) for i in range(4)] == [True, True, True, False]
    assert [made.is_right(third, i) for i in range(4)] == [False, False, False, True]
    assert third.text == "claws. Answer: hawk"
    assert made.document(source, 3).content.text == "hawk"
    table.save(made, tmp_path / "table.jsonl")
    assert table.load(tmp_path / "table.jsonl") == made
    data = (tmp_path / "table.jsonl").read_bytes()
    (tmp_path / "table.jsonl").write_bytes(data.replace(b"tawny", b"brown"))
    with pytest.raises(DataLossError, match="damaged"):
        table.load(tmp_path / "table.jsonl")
    rows[1]["positives"] = ["snowy owl"]
    changed = JsonlSource(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(PreconditionError, match="has changed"):
        made.document(changed, 2)
    with pytest.raises(InvalidInputError, match="'1'"):
        table.table_of(JsonlSource(write_jsonl(tmp_path / "a.jsonl", [rows[0], rows[0]])))


async def test_embedding_goes_on_at_the_missing_chunk(source, tmp_path):
    made, queries, documents, version = await embedded(source, tmp_path / "v", chunk=8, batch=3)
    files = sorted((tmp_path / "v").glob("*.npy"))
    assert len(files) == 4 + 4
    files[5].unlink()
    again = HandEmbedder(np.eye(26, dtype=np.float32))
    result = await embed(made, source, again, tmp_path / "v", chunk=8, batch=3)
    np.testing.assert_array_equal(result[0], queries)
    np.testing.assert_array_equal(result[1], documents)
    assert again.requests == [3, 3, 2]
    files[5].unlink()
    with pytest.raises(PreconditionError, match="Start that embedder again"):
        other = HandEmbedder(np.full((26, 26), 0.5, np.float32))
        await embed(made, source, other, tmp_path / "v", chunk=8, batch=3)


async def test_a_busy_embedder_is_waited_for(source, tmp_path):
    class Away(HandEmbedder):
        failures = 2

        async def embed(self, items, **options):
            if self.failures:
                self.failures -= 1
                raise UnavailableError("away", retry_after_s=0.01)
            return await super().embed(items, **options)

    stage = Away(np.eye(26, dtype=np.float32))
    made = table.table_of(source)
    queries, _, _ = await embed(made, source, stage, tmp_path / "v")
    assert len(queries) == 30
    stage.failures = 10**6
    with pytest.raises(UnavailableError):
        await embed(made, source, stage, tmp_path / "w", patience_s=0.03)


async def test_candidates_are_the_nearest_of_the_same_data_set(source, tmp_path):
    made, queries, documents, _ = await embedded(source, tmp_path / "v")
    found, cosines = candidates.nearest(made, queries, documents, count=20)
    for i, query in enumerate(made.queries):
        same = [j for j, d in enumerate(made.documents) if d.dataset == query.dataset]
        scores = documents[same].astype(np.float64) @ queries[i].astype(np.float64)
        there = found[i][found[i] != candidates.NONE]
        assert set(there) == set(same)  # 15 of 20 places: a data set is smaller
        np.testing.assert_allclose(cosines[i][: len(there)], np.sort(scores)[::-1], atol=1e-6)
    candidates.save(tmp_path / "c.npy", found, cosines)
    for a, b in zip(candidates.load(tmp_path / "c.npy"), (found, cosines), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_data_sets_are_searched_by_scann():
    """Through the index that serves, with its check of the recall; scores stay exact."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    documents = centres[rng.integers(0, 40, 2000)] + 0.3 * rng.normal(size=(2000, 16))
    queries = centres[rng.integers(0, 40, 30)] + 0.3 * rng.normal(size=(30, 16))
    documents, queries = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (documents, queries)
    )
    made = table.Table(
        ("a",),
        tuple(table.QueryEntry(f"q{i}", 0, "", "", "", ()) for i in range(30)),
        tuple(table.DocumentEntry(f"d{i:04d}", 0, "", (), 0, 0) for i in range(2000)),
        "",
    )
    config = IndexConfig(exact_below=500)
    found, cosines = candidates.nearest(made, queries, documents, count=50, config=config)
    exact, _ = candidates.nearest(made, queries, documents, count=50)
    recall = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(found, exact, strict=True)])
    assert recall > 0.95
    np.testing.assert_allclose(
        cosines, np.einsum("qkd,qd->qk", documents[found], queries), atol=1e-5
    )
    again, _ = candidates.nearest(made, queries, documents, count=50, config=config)
    np.testing.assert_array_equal(found, again)


async def test_the_reranker_arm_keeps_to_percent_of_positive(source, tmp_path):
    rules = Rules(arm=RERANKER, negatives=3, percent_of_positive=0.9, depth=12)
    round = await mined(source, tmp_path, rules)
    made = table.table_of(source)
    text_of = {d.key: d.text for d in made.documents}
    assert len(round) == 30
    some = 0
    for query, record in zip(made.queries, round, strict=True):
        assert record.positive_score == 1.0
        # Other examples of this data have documents with all three words too.
        for one in record.false_negatives:
            assert share_of_words(query.text, text_of[one.key]) == one.score >= 0.9
        for one in record.negatives:
            assert np.float32(share_of_words(query.text, text_of[one.key])) == one.score < 0.9
        scores = [one.score for one in record.negatives]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        some += len(record.false_negatives)
    assert some > 5
    assert round.manifest["models"]["reranker"] == "hand@1"


async def test_arms_differ_as_they_should(source, tmp_path):
    made = table.table_of(source)
    rounds = {}
    for arm in ARMS:
        role = HandReranker()
        rules = Rules(arm=arm, negatives=4, depth=12)
        rounds[arm] = await mined(source, tmp_path / arm, rules, role)
        assert bool(role.queries) == (arm in (RERANKER, UNFILTERED))
    for i, query in enumerate(made.queries):
        right = {made.documents[p].key for p in query.positives}
        of_arm = {arm: MinedSource(source, r, made)[i] for arm, r in rounds.items()}
        for arm, example in of_arm.items():
            keys = [d.key for d in example.negatives]
            assert len(keys) == (0 if arm == NONE else 4)
            assert len(set(keys)) == len(keys) and not set(keys) & right
            assert {made.datasets[made.documents[j].dataset] for j in _numbers(made, keys)} <= {
                example.dataset
            }
            assert bool(example.negative_scores) == (arm in (RERANKER, UNFILTERED))
            assert (example.positive_score is None) == (arm not in (RERANKER, UNFILTERED))
        assert all(s < 1.0 for s in of_arm[RERANKER].negative_scores)
        unfiltered = of_arm[UNFILTERED].negative_scores
        assert list(unfiltered) == sorted(unfiltered, reverse=True)
        dropped = rounds[UNFILTERED][i].false_negatives
        assert unfiltered[: len(dropped)] == tuple(one.score for one in dropped)[:4]
        # The same records serve both arms of the reranker.
        both = MinedSource(source, rounds[RERANKER], made, filtered=False)[i]
        assert both.negatives == of_arm[UNFILTERED].negatives
    random = [[s.key for s in r.negatives] for r in rounds[RANDOM]]
    assert random != [[s.key for s in r.negatives] for r in rounds[EMBEDDER]]


def _numbers(made: table.Table, keys: list[str]) -> list[int]:
    return [i for i, d in enumerate(made.documents) if d.key in keys]


async def test_groups_and_other_positives_are_never_negatives(tmp_path):
    rows = example_rows(12)
    for row in rows:
        row["dataset"] = "a"
        row["group"] = "even" if int(row["key"][1:]) % 2 == 0 else ""
    rows[1]["positives"].append("another right one")
    source = JsonlSource(write_jsonl(tmp_path / "g.jsonl", rows))
    made = table.table_of(source)
    for arm in (RANDOM, EMBEDDER, UNFILTERED):
        round = await mined(source, tmp_path / arm, Rules(arm=arm, negatives=12, depth=13))
        mining = MinedSource(source, round, made)
        even = {source[i].positives[0].key for i in range(0, 12, 2)}
        for i in range(12):
            keys = {d.key for d in mining[i].negatives}
            assert not keys & {d.key for d in source[i].positives}
            if i % 2 == 0:
                assert not keys & even and len(keys) == 7
            else:
                assert keys >= even


async def test_a_query_that_cannot_be_read_is_kept_without_negatives(tmp_path):
    rows = example_rows(8)
    rows[3]["positives"][0] += " unreadable"
    for row in rows:
        row["dataset"] = "ab"[row["key"] == "q3"]
    rows[4]["dataset"] = "b"
    source = JsonlSource(write_jsonl(tmp_path / "u.jsonl", rows))
    round = await mined(source, tmp_path, Rules(negatives=2, depth=4))
    assert [bool(r.refused) for r in round] == [i in (3, 4) for i in range(8)]
    assert "too long" in round[3].refused
    assert round.manifest["counts"]["refused"] == 2
    assert MinedSource(source, round, table.table_of(source))[3].negatives == ()


async def test_a_query_with_no_candidate_but_itself_is_not_asked(tmp_path):
    rows = example_rows(6)
    for row in rows:
        row["dataset"] = "alone" if row["key"] in ("q0", "q5") else "a"
        row["group"] = "pair" if row["dataset"] == "alone" else ""
    source = JsonlSource(write_jsonl(tmp_path / "n.jsonl", rows))
    role = HandReranker()
    round = await mined(source, tmp_path, Rules(negatives=2, depth=4), role)
    assert len(role.queries) == 4
    assert [len(r.negatives) + len(r.false_negatives) > 0 for r in round] == [
        False, True, True, True, True, False,
    ]  # fmt: skip


async def test_texts_are_needed_and_models_must_stay(tmp_path, source):
    (tmp_path / "owl.png").write_bytes(b"png")
    rows = [
        {"query": {"images": ["owl.png"]}, "positives": ["a"]},
        {"query": "b", "positives": ["c"]},
    ]
    pictures = JsonlSource(write_jsonl(tmp_path / "p.jsonl", rows))
    with pytest.raises(InvalidInputError, match="training.reason") as raised:
        await mined(pictures, tmp_path / "x", Rules())
    assert raised.value.reason == "NO_TEXT"
    role = HandReranker()
    role.version = "hand@2"
    with pytest.raises(PreconditionError, match="hand@2 by now"):
        await mined(source, tmp_path / "y", Rules(), role)


def test_a_table_is_of_its_data(tmp_path):
    """Missing ECRs are told before anything is kept, changed ones afterwards."""
    names = ("owl", "elk", "emu")
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    rows = [{"query": f"find {n}", "positives": [{"images": [f"{n}.png"]}]} for n in names]
    pictures = JsonlSource(write_jsonl(tmp_path / "p.jsonl", rows))

    def told(number: str, known: int) -> WithEcrs:
        store = EcrStore(tmp_path / f"ecrs{number}", arm=PLAIN, model="m", budget=8)
        for name, example in zip(names[:known], pictures, strict=False):
            one, side = example.positives[0], Side.DOCUMENT
            ecr = f"Answer: {name}{number}"
            store.append([Ecr(ecr_key(one, side), side, PLAIN, one.key, ecr, "m", 8)])
        return WithEcrs(pictures, store)

    space = Workspace(tmp_path / "state")
    space.root.mkdir()
    with pytest.raises(InvalidInputError, match="positive of p/3 has no text") as raised:
        space.table(told("1", known=2), reranks=True)
    assert raised.value.reason == "NO_TEXT" and not space.table_path.exists()
    made = space.table(told("1", known=3), reranks=True)
    assert space.table(told("1", known=3), reranks=True) == made
    with pytest.raises(PreconditionError, match="positive of example 0 .* has another ECR") as e:
        space.table(told("2", known=3))
    assert e.value.reason == "DATA_CHANGED"
    rows[2]["query"] = "find it"
    other = JsonlSource(write_jsonl(tmp_path / "q.jsonl", rows), dataset="p")
    with pytest.raises(PreconditionError, match="example 2 .* asks something else"):
        space.table(WithEcrs(other, EcrStore(tmp_path / "ecrs1")))
    # Without a reranker nobody reads the texts.
    bare = Workspace(tmp_path / "bare")
    bare.root.mkdir()
    assert len(bare.table(pictures).queries) == 3


async def test_a_round_is_of_its_data(source, tmp_path):
    round = await mined(source, tmp_path, Rules(arm=EMBEDDER))
    other = JsonlSource(write_jsonl(tmp_path / "other.jsonl", example_rows(29)))
    with pytest.raises(InvalidInputError, match="was mined from"):
        MinedSource(other, round, table.table_of(other))
    made = table.table_of(source)
    given = MinedSource(source, round, made, negatives=2, keep_given=True)
    assert len(given[0].negatives) == 2
    assert given.document(0, 0) == source[0].positives[0]
    assert given.document(0, 1) == given[0].negatives[0]
    shifted = replace(made, queries=(*made.queries[1:], made.queries[0]))
    with pytest.raises(DataLossError, match="expected q1"):
        MinedSource(source, round, shifted)[0]
