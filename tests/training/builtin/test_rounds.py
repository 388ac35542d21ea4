"""Rounds: what is better is kept, what is worse is dropped, what is done is not done again."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from training.builtin import rounds, unified
from training.builtin.rounds import Config, Queries, run, trainer_of, verdict
from training.data.sources import open_source
from training.mining.records import Record, Scored
from training.mining.rounds import RoundWriter
from tte_jax.builtin.models import REASONER, RERANKER
from tte_jax.errors import InvalidInputError, NotFoundError

BEFORE = [3, 3, 3, 3, 3, 3, 3, 3]


def ranks(path: Path, none: list[int], ecr: list[int]) -> Path:
    task = {"answers": list("abcdefgh"), "pool": 50, "named": [True] * 8}
    task["ranks"] = {"none": none, "ecr": ecr}
    path.write_text(json.dumps({"models": {"embedder": path.stem}, "tasks": {"one": task}}))
    return path


@pytest.mark.parametrize(
    ("none", "ecr", "kept"),
    [
        (BEFORE, BEFORE, True),  # the same is not worse
        ([0] * 8, [2] * 8, True),
        ([4] * 8, [4] * 8, False),
        ([3, 3, 3, 3, 3, 3, 3, 0], [3, 3, 3, 3, 3, 3, 3, 4], True),  # less than chance in one arm
        ([0] * 8, [9] * 8, False),  # better in the mean, and surely worse in one arm
    ],
)
def test_the_verdict(tmp_path: Path, none: list[int], ecr: list[int], kept: bool) -> None:
    found = verdict(
        ranks(tmp_path / "a.json", BEFORE, BEFORE), ranks(tmp_path / "b.json", none, ecr)
    )
    assert found.kept == kept
    assert set(found.figures) == {"none", "ecr", "reasoning names it"}
    mean, low, high = found.figures["none"]
    assert low <= mean <= high


def test_the_trainer_is_asked_for_what_it_knows(tmp_path: Path) -> None:
    config = Config(data=tmp_path / "the {data}", own=Path("own.jsonl"), steps=7)
    values = {"python": "python", "model": "m", "negatives": "n", "out": "o"}
    # As the loop does: split first, then replaced.
    words = [word.format(**values) for word in shlex.split(trainer_of(config))]
    asked = tyro.cli(unified.Config, args=words[3:])
    assert words[:3] == ["python", "-m", "training.builtin.unified"]
    assert (asked.data, asked.steps) == (tmp_path / "the {data}", 7)
    assert (asked.start, asked.mined, asked.out) == (Path("m"), Path("n"), Path("o"))
    assert asked.own == Path("own.jsonl") and asked.lr == config.lr


def test_every_round_asks_for_others_and_a_built_data_set() -> None:
    config = Config(data=Path("nowhere"), queries=Queries(5, 0, 2))
    first, second = (rounds.data_of(config, n) for n in (0, 1))
    assert first == "emoji:nowhere?text=5&image=0&composed=2&seed=1" and first != second
    with pytest.raises(NotFoundError, match="python -m training.data.emoji"):
        open_source(first)


def models(folder: Path, word: str) -> Path:
    """Two model directories; `word` stands in the retriever's."""
    for name in (REASONER, RERANKER):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(word)
    return folder


def word_of(folder: Path) -> str:
    return (folder / REASONER / "config.json").read_text()


class Hand:
    """In place of the models: a round appends its number to the retriever's word, and `score` says
    which rank all held-out queries have with a word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, score: Callable[[str], int]) -> None:
        self.trained: list[str] = []
        self.evaluated: list[str] = []
        self._score = score
        monkeypatch.setattr(rounds, "mined_and_trained", self._train)
        monkeypatch.setattr(rounds, "evaluated", self._evaluate)

    async def _train(self, config: Config, number: int, start: Path, folder: Path) -> Path:
        self.trained.append(word_of(start))
        out = folder / "loop/export"
        if not out.exists():
            with RoundWriter(folder / "loop/rounds", 0, {}) as writer:
                writer.append(Record("d", "q", 0.9, (Scored("x", 0.1),)))
                writer.seal()
            out.mkdir()
            (out / "config.json").write_text(f"{word_of(start)}{number}")
        return out

    def _evaluate(self, config: Config, folder: Path, to: Path) -> Path:
        self.evaluated.append(word_of(folder))
        rank = self._score(word_of(folder))
        return ranks(to / "ranks.json", [rank] * 8, [rank] * 8)


def told(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.out / "rounds.jsonl").read_text().splitlines()]


def test_a_worse_round_is_dropped_and_the_next_begins_from_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(monkeypatch, {"m": 5, "m0": 9, "m1": 2}.__getitem__)
    config = Config(
        models=models(tmp_path / "first", "m"), out=tmp_path / "out", result=tmp_path / "last"
    )
    assert asyncio.run(run(config)) == tmp_path / "last"
    assert hand.trained == ["m", "m"] and hand.evaluated == ["m", "m0", "m1"]
    assert [row["kept"] for row in told(config)] == [False, True]
    assert told(config)[0]["mined"]["negatives"] == 1
    assert told(config)[0]["difference"]["none"][0] < 0 < told(config)[1]["difference"]["none"][0]
    assert word_of(tmp_path / "last") == "m1"
    assert (tmp_path / "last" / RERANKER / "config.json").read_text() == "m"


def test_a_kept_round_is_where_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(monkeypatch, {"m": 5, "m0": 3, "m01": 4}.__getitem__)
    config = Config(models=models(tmp_path / "first", "m"), out=tmp_path / "out")
    asyncio.run(run(config))
    assert hand.trained == ["m", "m0"]
    assert [row["kept"] for row in told(config)] == [True, False]
    assert word_of(config.out / "models") == "m0"
    # Again: the same verdicts, the same models.
    first = (config.out / "rounds.jsonl").read_bytes()
    asyncio.run(run(config))
    assert (config.out / "rounds.jsonl").read_bytes() == first
    assert word_of(config.out / "models") == "m0"


def test_options_that_fit_nothing(tmp_path: Path) -> None:
    config = Config(models=models(tmp_path / "first", "m"), out=tmp_path / "out")
    for wrong in (
        replace(config, rounds=0),
        replace(config, queries=Queries(0, 0, 0)),
        replace(config, models=tmp_path),
    ):
        with pytest.raises(InvalidInputError):
            asyncio.run(run(wrong))
    assert not config.out.exists()
