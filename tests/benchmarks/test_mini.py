"""The benchmark over mini-MMEB: what it takes out of result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import mini
from tte_jax.errors import NotFoundError

MODELS = {"embedder": {"version": "m@1"}}


def write(place: Path, arm: str, task: str, score: float, failed: int = 0) -> None:
    folder = place / arm / "image"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}_score.json").write_text(json.dumps({"hit@1": score}))
    about = {
        "metric": "hit@1", "modality": "image", "score": score, "queries": 40, "pool": 30,
        "chance": 0.25, "queries_failed": failed, "settings": {"models": MODELS},
        "interval": {"mean": score, "low": score - 0.1, "high": score + 0.1, "level": 0.95},
    }  # fmt: skip
    (folder / f"{task}_info.json").write_text(json.dumps(about))


def test_every_arm_of_every_task_that_was_run(tmp_path: Path) -> None:
    tasks = {name: {"packages": {"p": {"version": "1"}}} for name in ("mini-t2i", "mini-qa")}
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": tasks}))
    for place, arm in enumerate(mini.ARMS):
        write(tmp_path, arm, "mini-t2i", 0.5, failed=place)
        write(tmp_path, arm, "mini-qa", 0.1 * (place + 1))
    write(tmp_path, "none-ecrr10", "mini-qa", 0.9)
    found = mini.gathered(tmp_path, tmp_path)
    assert list(found["tasks"]) == ["mini-qa", "mini-t2i"] and found["models"] == MODELS
    one = found["tasks"]["mini-qa"]
    assert [round(a["score"], 1) for a in one["arms"].values()] == [0.1, 0.2, 0.3]
    assert one["like"] == "A-OKVQA" and one["chance"] == 0.25 and one["packages"]["p"]
    assert found["tasks"]["mini-t2i"]["failed"] == len(mini.ARMS) - 1


def test_a_missing_arm_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "none", "mini-t2i", 0.5)
    with pytest.raises(NotFoundError):
        mini.gathered(tmp_path, tmp_path)
