"""The experiments' pieces over the real cascade with known answers, and what is said about them."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import experiment_tables, tables
from benchmarks.experiments import __main__ as command
from benchmarks.experiments import figures, pieces, plan, tasks
from benchmarks.experiments.stages import Coarse, Oracle, Remembered
from tests.cascade.fakes import FakeEmbedder, FakeReasoner, FakeReranker, ecr, text_of
from tests.training.drawings import emoji_data
from training.builtin.evaluate import FOUR_STYLES, UNSEEN_STYLE, png
from training.data.emoji import EmojiData
from tte_jax.content import Content, Side
from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation.arms import Arm, Ecr
from tte_jax.evaluation.runner import Stages
from tte_jax.evaluation.task import EvalTask, Item, Query
from tte_jax.preprocess.image import decode_image
from tte_jax.stages import EmbedItem, ReasonItem

# --- pieces ---

NAMES = ("aa", "bb", "cd")
ANSWERS = {"first": "aa", "second": "bb", "third": "cd"} | {n: n for n in NAMES}
# The second query is taken for another; a candidate's name is wrong, but the third query too.
SAID = {
    "first": ecr("x", "AA ", tokens=3), "second": ecr("x", "aa", tokens=5),
    "third": ecr("x", "dd"), "aa": ecr("x", "aa"), "bb": ecr("x", "bb"), "cd": ecr("x", "d"),
}  # fmt: skip


def loaded(text: str) -> Any:
    return lambda: Content.of(text)


def case() -> tasks.Case:
    queries = [Query(q, loaded(q), (ANSWERS[q],)) for q in ("first", "second", "third")]
    items = [Item(name, loaded(name)) for name in NAMES]
    task = EvalTask("toy", "image", "hit@1", tuple(queries), lambda: iter(items))
    return tasks.Case(task, ANSWERS, {})


def fakes() -> tuple[Stages, FakeReasoner]:
    reasoner = FakeReasoner(SAID)
    return Stages(reasoner, FakeEmbedder(), FakeReranker({"x. Answer: bb": 1.0} | SCORES)), reasoner


SCORES = {f"x. Answer: {answer}": 0.1 for answer in ("aa", "d")}
ARMS = [Arm(Ecr.NONE, 0), Arm(Ecr.FULL, 8), Arm(Ecr.FULL, 0, document_tokens=8)]


def test_a_piece_says_what_came_of_every_query(tmp_path: Path) -> None:
    kept, (stages, reasoner) = pieces.Kept(tmp_path), fakes()
    asyncio.run(pieces.run(kept, "fake", case(), ARMS, stages, say=lambda _: None))
    with_ecr = kept.read("fake", "toy", "full8")
    assert with_ecr["ranks"] == [0, 1, 0]
    assert with_ecr["right"] == [True, False, False]
    assert with_ecr["target_right"] == [True, True, False]
    assert with_ecr["documents_right"] == pytest.approx(2 / 3)
    assert with_ecr["tokens"] == [3, 5, 4] and with_ecr["cut"] == [False] * 3
    assert with_ecr["queries_failed"] == 0 and with_ecr["degraded"] == {}
    without = kept.read("fake", "toy", "none")
    assert without["right"] is without["documents_right"] is None and without["tokens"] == [0] * 3
    # Queries without a reasoning over candidates that have one.
    alone = kept.read("fake", "toy", "full-docs8")
    assert alone["right"] is None and alone["documents_right"] == with_ecr["documents_right"]
    assert reasoner.max_tokens.count(8) == len(reasoner.max_tokens)


def test_a_kept_piece_is_not_run_again(tmp_path: Path) -> None:
    kept, (stages, reasoner) = pieces.Kept(tmp_path), fakes()
    for arms in (ARMS[:1], ARMS[:2], ARMS[:2]):
        left = kept.lacks("fake", "toy", arms)
        asyncio.run(pieces.run(kept, "fake", case(), left, stages, say=lambda _: None))
    assert left == [] and len(reasoner.items) == 6
    kept.path("fake", "toy", "none").write_text("{")
    with pytest.raises(DataLossError, match=r"none.json cannot be read .*; delete it"):
        kept.read("fake", "toy", "none")


def test_reranking_is_of_the_ecrs_that_were_right_or_not(tmp_path: Path) -> None:
    kept, (stages, _) = pieces.Kept(tmp_path), fakes()
    arm = Arm(Ecr.FULL, 8, depth=3)
    asyncio.run(pieces.run(kept, "fake", case(), [arm], stages, say=lambda _: None))
    # The reranker always likes "bb" best.
    assert kept.read("fake", "toy", arm.name)["ranks"][1] == 0


# --- stages ---


def test_a_coarse_reasoner_sees_no_detail_and_changes_nothing_else() -> None:
    board = np.indices((8, 8)).sum(0) % 2 * 255
    content = Content.of("a change", png(np.repeat(board[..., None], 3, 2).astype(np.uint8)))
    inner = FakeReasoner()
    asyncio.run(Coarse(inner, 2).reason([ReasonItem(content, Side.QUERY)], max_tokens=8))
    (item,) = inner.items
    assert item.content.text == "a change" and item.side is Side.QUERY
    seen = np.asarray(decode_image(item.content.media[0].data))
    assert seen.shape == (8, 8, 3) and np.ptp(seen) <= 2 and 120 < seen.mean() < 135


def test_the_oracle_knows_each_side_by_itself() -> None:
    oracle = Oracle()
    oracle.learn(Side.QUERY, Content.of("it"), "<think>a</think>\nAnswer: b")
    items = [ReasonItem(Content.of("it"), side) for side in (Side.QUERY, Side.DOCUMENT)]
    (one, other), _ = asyncio.run(oracle.reason(items, max_tokens=8))
    assert (one.think, one.answer) == ("a", "b") and other.text == ""


def test_candidates_are_embedded_once_and_queries_each_time() -> None:
    inner = FakeEmbedder()
    remembered = Remembered(inner)
    items = [EmbedItem(Content.of(t), s) for t, s in product("ab", (Side.DOCUMENT, Side.QUERY))]
    first, _ = asyncio.run(remembered.embed(items))
    again, _ = asyncio.run(remembered.embed(items[::-1]))
    np.testing.assert_array_equal(first, again[::-1])
    assert [text_of(i.content) for i in inner.items] == ["a", "a", "b", "b", "b", "a"]
    other = EmbedItem(Content.of("a"), Side.DOCUMENT, "Answer: z")
    vectors, _ = asyncio.run(remembered.embed([other]))
    assert vectors[0, 25] == 1.0


# --- tasks ---


def four_styles() -> EmojiData:
    data = emoji_data(side=8)
    count = len(data.concepts)
    rng = np.random.default_rng(0)
    n = 4 * count
    dark_man = [c.gender == "man" and c.skin == "dark" for c in data.concepts]
    return replace(
        data,
        styles=list(FOUR_STYLES),
        images=rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8),
        style_ids=np.repeat(np.arange(4, dtype=np.int32), count),
        concept_ids=np.tile(np.arange(count, dtype=np.int32), 4),
        variants=np.zeros(n, np.int32),
        heldout_concept=np.zeros(n, bool),
        heldout_combination=np.tile(dark_man, 4),
    )


def test_tasks_ask_for_what_is_held_out_and_know_the_answers() -> None:
    data = four_styles()
    made = tasks.cases(data, tasks.NAMES, queries=5, pool=0, seed=0)
    pictures = tasks.Pictures(data)
    by_key = {c.key: c for c in data.concepts}
    for name, one in made.items():
        assert 2 <= len(one.task.queries) <= 5
        names = {item.name for item in one.task.candidates()}
        for query in one.task.queries:
            (right,) = query.label
            assert right in names and one.answers[query.id] == one.answers[right]
            assert one.answers[right] in one.ecrs[query.id]
            content = query.load()
            if name.startswith("composed"):
                assert (by_key[right].gender, by_key[right].skin) == ("man", "dark")
                assert content.text and content.media
            elif name == "image":
                assert content.media[0].data == pictures.of(UNSEEN_STYLE, right)
            else:
                assert not content.media
        (first, *_) = one.task.candidates()
        style = UNSEEN_STYLE if name in ("label", "tags") else "openmoji"
        assert first.load().media[0].data == pictures.of(style, first.name)


def test_a_smaller_pool_holds_every_right_candidate() -> None:
    made = tasks.cases(four_styles(), ["image"], queries=3, pool=6, seed=1)["image"]
    names = [item.name for item in made.task.candidates()]
    assert len(names) == len(set(names)) == 6
    assert {q.label[0] for q in made.task.queries} <= set(names)
    again = tasks.cases(four_styles(), ["image"], queries=3, pool=6, seed=1)["image"]
    assert [item.name for item in again.task.candidates()] == names


# --- the plan ---


def test_every_piece_of_the_plan_can_be_run() -> None:
    for name, one in plan.EXPERIMENTS.items():
        run = {(r, arm.name) for r, arms in plan.wanted([name]).items() for arm in arms}
        assert run == {(p.reasoner, p.arm) for p in one.pieces.values()}
        compared = {label for c in one.comparisons for label in (c.worse, c.better)}
        assert compared <= set(one.pieces)
    everything = plan.wanted(list(plan.EXPERIMENTS))
    assert set(everything) == set(plan.REASONERS)
    assert len(everything[plan.SHIPPED]) == len(plan.ARMS)


# --- what is said about pieces ---


def piece(hits: int, count: int = 100, **given: Any) -> dict[str, Any]:
    """The first `hits` queries are right, the others come second."""
    marks = [i < count // 2 for i in range(count)]
    return {
        "ranks": [0 if i < hits else 1 for i in range(count)],
        "right": marks, "target_right": marks, "cut": [False] * count, "tokens": [4] * count,
        "documents_right": 0.25, "pool": 1000, "candidates_failed": 0, "queries_failed": 0,
        "degraded": {}, "seconds": 30.0,
    } | given  # fmt: skip


# Right answers of 100: more with more tokens until 32; reranking harms; the oracle helps.
WORTH = {"none": 20, "full8": 30, "full16": 40, "full32": 60, "full64": 60}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> pieces.Kept:
    made = pieces.Kept(tmp_path_factory.mktemp("pieces"))
    for (reasoner, arms), task in product(
        plan.wanted(list(plan.EXPERIMENTS)).items(), ("label", "image")
    ):
        for arm in arms:
            hits = WORTH.get(arm.name, 10 if arm.depth else 50)
            if reasoner != plan.SHIPPED:
                hits = 90 if reasoner == plan.ORACLE else 35
            given: dict[str, Any] = {} if arm.tokens else {"right": None, "cut": None}
            if reasoner != plan.SHIPPED:
                given["documents_right"] = hits / 100
            made.write(reasoner, task, arm.name, piece(hits, **given))
    return made


@pytest.fixture(scope="module")
def result(kept: pieces.Kept) -> dict[str, Any]:
    about = {
        "command": "python -m benchmarks.experiments", "date": "2026-01-02", "commit": "abc",
        "machine": {"cores": 2, "cpu": "Some CPU"}, "versions": {"jax": "0.1"}, "noisy": True,
        "settings": {"models": {"reasoner": "m@1", "embedder": "m@1", "reranker": "r@1"}},
    }  # fmt: skip
    return command.result(kept, ["label", "image"], about)


def test_differences_are_paired_and_hold_together(result: dict[str, Any]) -> None:
    found = result["experiments"]["budget"]["comparisons"]
    first, still = found[0], found[3]
    assert first["difference"] == pytest.approx(0.1) and first["low"] > 0
    assert first["tasks"]["label"]["wins"] == 10 and first["tasks"]["label"]["losses"] == 0
    assert still["difference"] == still["low"] == still["high"] == 0
    assert first["level"] == pytest.approx(1 - 0.05 / len(found), abs=1e-5)
    row = result["experiments"]["budget"]["rows"]["both sides, 8"]
    assert row["hit@1"] == pytest.approx(0.3)
    assert row["interval"][0] < 0.3 < row["interval"][1]
    assert (row["queries_right"], row["documents_right"], row["right"]) == (0.5, 0.25, 0.375)
    assert row["tasks"]["label"]["mrr"] == pytest.approx(0.65) and row["seconds"] == 60


def test_verdicts_follow_the_intervals() -> None:
    def said(low: float, high: float, says: str = "more is better") -> tuple[str, str]:
        one = {"low": low, "high": high, "says": says}
        return experiment_tables.outcome(one), experiment_tables.verdict(one)

    assert said(0.01, 0.1) == ("better", "agrees")
    assert said(-0.1, -0.01) == ("worse", "the opposite")
    assert said(-0.1, 0.1) == ("no difference shown", "no difference shown")
    assert said(0.0, 0.1)[0] == "no difference shown"
    assert said(0.01, 0.1, says="")[1] == "–"


def test_tables_say_what_the_pieces_are(result: dict[str, Any]) -> None:
    text = experiment_tables.budget(result)
    assert "| both sides, 8 | 4.0 | 0.0 | 50.0 | 25.0 | 30.0 | 30.0 | 30.0 (" in text
    assert "| queries alone, 0 | 4.0 | – | – | 25.0 |" in text
    assert "both sides, 0 → both sides, 8 | +10.0 (" in text and "| better | agrees |" in text
    assert "(figures/budget.svg)" in text
    text = experiment_tables.ablation(result)
    assert "ECR → ECR + ECRR, first 10 | -50.0 (" in text and "| worse | the opposite |" in text
    assert "| of query and right candidate | 50 | 40.0 | 100.0 | 20.0 | 20.0 |" in text
    # In order of right ECRs: shipped and its cuts (50, 30, 40), the weaker (35), the oracle (90).
    assert "over these 8 reasoners: +0." in experiment_tables.strength(result)
    text = experiment_tables.summary(result)
    assert "| Token budget | 5 | 1 | 0 |" in text and "Other work ran" in text
    assert "`m@1`, `r@1`" in text


def test_an_experiment_that_lacks_a_piece_is_left_out(
    kept: pieces.Kept, result: dict[str, Any], tmp_path: Path
) -> None:
    missing = kept.path("int8", "image", "full64")
    away = missing.rename(tmp_path / "away.json")
    try:
        found = command.result(kept, ["label", "image"], {})
    finally:
        away.rename(missing)
    assert set(found["experiments"]) == {"budget", "ablation"}
    partial = result | {"experiments": found["experiments"]}
    assert "--only strength` makes this table" in experiment_tables.strength(partial)
    assert "| Strength of the reasoner | – | – | – | – |" in experiment_tables.summary(partial)


def test_figures_are_drawn_again_only_for_other_results(
    result: dict[str, Any], tmp_path: Path
) -> None:
    drawn = figures.write(result, tmp_path)
    assert [p.name for p in drawn] == ["budget.svg", "ablation.svg", "strength.svg"]
    first = {p.name: p.read_bytes() for p in drawn}
    assert all(len(body) < 60_000 for body in first.values())
    assert b"reasoning tokens" in first["budget.svg"]
    assert figures.write(result, tmp_path) == []
    other = copy.deepcopy(result)
    other["experiments"]["budget"]["rows"]["both sides, 8"]["hit@1"] = 0.99
    assert figures.stale(other, tmp_path) == ["budget"]
    for path in drawn:
        path.unlink()
    assert {p.name: p.read_bytes() for p in figures.write(result, tmp_path)} == first


def test_committed_figures_show_the_committed_result() -> None:
    shown = figures.shown(tables.ROOT / "benchmarks/results")
    assert figures.stale(shown, tables.ROOT / figures.FOLDER) == []


# --- the command ---


def test_wrong_options_and_missing_data_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidInputError, match="--only nothing: there are budget, ablation"):
        command.Config(only=("nothing",))
    with pytest.raises(InvalidInputError, match="--limit is 1"):
        command.Config(limit=1)
    assert command.main(command.Config(data=tmp_path / "none", work=tmp_path)) == 3
    assert "python -m training.data.emoji --out" in capsys.readouterr().err


def test_pieces_of_other_settings_are_refused(tmp_path: Path) -> None:
    wanted = {"limit": 3, "models": {"reasoner": "m@1"}}
    command.claim(tmp_path, wanted)
    command.claim(tmp_path, wanted)
    with pytest.raises(InvalidInputError, match=r"other settings \(models\); delete it"):
        command.claim(tmp_path, wanted | {"models": {"reasoner": "m@2"}})
