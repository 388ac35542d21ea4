"""The regression gate: better or equal passes, significantly worse or incomplete does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gate

TASKS = ("mini-classification", "mini-t2i")
QUERIES = 40


def write(folder: Path, arm: str, task: str, hits: list[bool]) -> None:
    place = folder / arm / "image"
    place.mkdir(parents=True, exist_ok=True)
    others = [f"other{i}" for i in range(30)]
    rows = [
        {
            "prediction": [f"d{i}", *others] if hit else [*others, f"d{i}"],
            "label": [f"d{i}"],
            "rel_scores": None,
        }
        for i, hit in enumerate(hits)
    ]
    lines = [json.dumps(row) for row in rows]
    (place / f"{task}_pred.jsonl").write_text("\n".join(lines) + "\n")
    (place / f"{task}_score.json").write_text(json.dumps({"hit@1": float(np.mean(hits))}))
    about = {"metric": "hit@1", "modality": "image", "score": 1, "seconds_per_query": {"mean": 9}}
    (place / f"{task}_info.json").write_text(json.dumps(about))


@pytest.fixture
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two arms at a hit rate of one half, pruned as they are committed."""
    results = tmp_path / "before"
    for arm in ("none", "full64"):
        for task in TASKS:
            write(results, arm, task, [i % 2 == 0 for i in range(QUERIES)])
    place = tmp_path / "baseline"
    gate.keep(results, place)
    monkeypatch.setattr(gate, "BASELINE", place)
    return place


def test_what_is_kept_is_small_and_scores_the_same(baseline: Path) -> None:
    place = baseline / "none" / "image"
    rows = [json.loads(x) for x in (place / "mini-t2i_pred.jsonl").read_text().splitlines()]
    assert {len(row["prediction"]) for row in rows} == {gate.KEPT}
    assert "seconds_per_query" not in (place / "mini-t2i_info.json").read_text()


@pytest.mark.parametrize(
    ("rate", "code"), [(2, 0), (1, 0), (8, 1)], ids=["the same", "better", "worse"]
)
def test_a_drop_fails(
    baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: int, code: int
) -> None:
    for task in TASKS:
        write(tmp_path / "now", "none", task, [i % 2 == 0 for i in range(QUERIES)])
        write(tmp_path / "now", "full64", task, [i % rate == 0 for i in range(QUERIES)])
    assert gate.main(["--results", str(tmp_path / "now")]) == code
    none, full = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert none == "none: hit@1 50.0, +0.0 (+0.0 to +0.0): ok"
    assert full.endswith("WORSE" if code else "ok")


def test_a_missing_task_fails(baseline: Path, tmp_path: Path) -> None:
    for arm in ("none", "full64"):
        write(tmp_path / "now", arm, TASKS[0], [i % 2 == 0 for i in range(QUERIES)])
    assert gate.main(["--results", str(tmp_path / "now")]) == 1


def test_the_committed_results_are_of_every_arm_and_task() -> None:
    arms = {path.name for path in gate.BASELINE.iterdir()}
    assert arms == {"none", "none-ecrr10", "full64", "full64-ecrr10"}
    for arm in arms:
        found = {p.name for p in (gate.BASELINE / arm).rglob("*_pred.jsonl")}
        assert found == {f"{task}_pred.jsonl" for task in gate.TASKS}
