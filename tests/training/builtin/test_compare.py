"""Two evaluations are compared query by query, and only where they asked the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training.builtin.compare import NAMED, Config, main, over_tasks, paired, read
from tte_jax.cli import exits
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError


def evaluation(ranks: list[int], *, pool: int = 100, answers: str = "abcd") -> dict:
    task = {
        "answers": list(answers),
        "pool": pool,
        "named": [rank == 0 for rank in ranks],
        "ranks": {"none": ranks, "ecr": ranks[::-1]},
    }
    return {"models": {"embedder": "m@1"}, "tasks": {"one": task, "two": task}}


def test_scores_by_hand() -> None:
    before, after = evaluation([0, 9, 10, 50]), evaluation([0, 0, 50, 1])
    hits = paired(before, after, "hit@1")
    assert hits["none"][0].before.tolist() == [1, 0, 0, 0]
    assert hits["none"][1].after.tolist() == [1, 1, 0, 0]
    assert hits["ecr"][0].after.tolist() == [0, 0, 1, 1]
    assert hits[NAMED][0].before.tolist() == [1, 0, 0, 0]
    difference = hits["none"][0].difference
    assert (difference.difference, difference.wins, difference.losses) == (0.25, 1, 0)
    assert over_tasks(hits["none"]).mean == pytest.approx(0.25)
    assert paired(before, after, "hit@10")["none"][0].before.tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(
        paired(before, after, "mrr@50")["none"][0].before, [1, 1 / 10, 1 / 11, 0]
    )


@pytest.mark.parametrize("other", [{"pool": 99}, {"answers": "abce"}])
def test_other_questions_are_refused(other: dict) -> None:
    before, after = evaluation([0, 1, 2, 3]), evaluation([0, 1, 2, 3], **other)
    with pytest.raises(InvalidInputError, match="one: the evaluations asked other queries"):
        paired(before, after, "hit@1")
    del after["tasks"]["two"]
    with pytest.raises(InvalidInputError, match="other tasks"):
        paired(before, after, "hit@1")


def test_the_command_prints_a_line_for_each_task_and_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(evaluation([1, 1, 1, 1])))
    after.write_text(json.dumps(evaluation([0, 0, 0, 1])))
    assert main(Config(before, after, metrics=("hit@1",))) == exits.OK
    said = capsys.readouterr().out
    assert said.count("none               0.000 → 0.750  +0.750") == 3  # two tasks and their mean
    assert "3/0" in said
    assert main(Config(before, after, metrics=("hit@7",))) == exits.INVALID
    assert "no measure is called 'hit@7'" in capsys.readouterr().err


def test_files_that_are_not_there_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="evaluate --ranks"):
        read(tmp_path / "none.json")
    (tmp_path / "quality.json").write_text('{"models": {}}')
    with pytest.raises(DataLossError, match="its --out is another file"):
        read(tmp_path / "quality.json")
