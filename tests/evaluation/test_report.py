"""The aggregator on files as the public scorer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError
from tte_jax.evaluation import outputs
from tte_jax.evaluation.metrics import Mode
from tte_jax.evaluation.mmeb_v2 import files
from tte_jax.evaluation.mmeb_v2.registry import DATASETS
from tte_jax.evaluation.reasoners import Recorded
from tte_jax.evaluation.report import as_json, both_modes, compare_runs, find_runs, recompute


def write(folder: Path, scores: dict[str, float]) -> Path:
    for info in DATASETS:
        if info.name in scores:
            place = folder / info.modality
            place.mkdir(parents=True, exist_ok=True)
            row = {info.metric: scores[info.name], "num_pred": 1, "num_data": 1}
            (place / f"{info.name}_score.json").write_text(json.dumps(row))
    return folder


def complete(value: dict[str, float]) -> dict[str, float]:
    return {d.name: value[d.modality] for d in DATASETS}


def test_all_weighs_the_modalities_36_18_24(tmp_path: Path) -> None:
    scores = complete({"image": 0.9, "video": 0.3, "visdoc": 0.6})
    (run,) = find_runs([write(tmp_path / "ours", scores)])
    means = run.means()
    assert means["image"].value == pytest.approx(0.9)
    assert means["video"].value == pytest.approx(0.3)
    assert means["visdoc"].value == pytest.approx(0.6)
    assert means["All"].value == pytest.approx((36 * 0.9 + 18 * 0.3 + 24 * 0.6) / 78)
    assert run.name == "ours"


@pytest.mark.parametrize("gone", ["SUN397", "MSVD", "ViDoSeek-doc"])
def test_with_a_task_missing_there_is_no_all(gone: str, tmp_path: Path) -> None:
    scores = complete({"image": 0.9, "video": 0.3, "visdoc": 0.6})
    del scores[gone]
    (run,) = find_runs([write(tmp_path, scores)])
    means = run.means()
    assert means["All"].value is None and means["All"].missing == (gone,)
    none = [name for name, mean in means.items() if mean.value is None]
    assert len(none) == 2
    assert as_json([run])["runs"][0]["means"]["All"]["value"] is None


def test_names_and_places_of_others(tmp_path: Path) -> None:
    (tmp_path / "ViDoSeek-page-fixed_score.json").write_text('{"ndcg_linear@5": 0.5}')
    (tmp_path / "Kinetics-700_score.json").write_text('{"hit@1": 0.25}')
    (run,) = find_runs([tmp_path])
    assert {n: t.score for n, t in run.tasks.items()} == {"ViDoSeek-page": 0.5, "K700": 0.25}
    (tmp_path / "ViDoSeek-page_score.json").write_text('{"ndcg_linear@5": 0.5}')
    with pytest.raises(InvalidInputError, match="two results of ViDoSeek-page"):
        find_runs([tmp_path])


def test_many_runs_below_one_folder(tmp_path: Path) -> None:
    for arm in ("none", "full64"):
        write(tmp_path / "out" / arm, {"MSVD": 0.5})
    assert [r.name for r in find_runs([tmp_path / "out"])] == ["out/full64", "out/none"]


def test_runs_of_one_name_are_told_apart_and_none_is_shown_twice(tmp_path: Path) -> None:
    one, two = tmp_path / "before/none", tmp_path / "after/none"
    for folder in (one, two):
        write(folder, {"MSVD": 0.5})
    assert [r.name for r in find_runs([one, two])] == [one.as_posix(), two.as_posix()]
    for twice in ([one, one], [tmp_path / "before", one]):
        with pytest.raises(InvalidInputError, match="before/none would be shown twice"):
            find_runs(twice)
    with pytest.raises(InvalidInputError, match="before/none/video would be shown twice"):
        find_runs([one, one / "video"])


def test_the_folder_of_a_modality_is_a_run(tmp_path: Path) -> None:
    write(tmp_path / "none", {"MSVD": 0.5, "SUN397": 0.25})
    (run,) = find_runs([tmp_path / "none/video"])
    assert run.name == "video" and {n: t.score for n, t in run.tasks.items()} == {"MSVD": 0.5}


def test_pages_of_others_are_scored_as_pages(tmp_path: Path) -> None:
    for folder in ("visdoc", "image"):
        (tmp_path / folder).mkdir()
        scores = '{"hit@1": 0.1, "ndcg_linear@5": 0.5}'
        (tmp_path / folder / f"own-{folder}_score.json").write_text(scores)
    (run,) = find_runs([tmp_path])
    found = {name: (task.metric, task.score) for name, task in run.tasks.items()}
    assert found == {"own-visdoc": ("ndcg_linear@5", 0.5), "own-image": ("hit@1", 0.1)}


def test_rankings_give_both_modes(tmp_path: Path) -> None:
    write(tmp_path, {"ViDoRe_docvqa": 0.86})
    row = {"prediction": [7, 3], "label": [7, 3], "rel_scores": [2, 1]}
    (tmp_path / "visdoc/ViDoRe_docvqa_pred.jsonl").write_text(json.dumps(row) + "\n")
    (run,) = find_runs([tmp_path])
    exact, compat = both_modes(run.tasks["ViDoRe_docvqa"]) or (0.0, 0.0)
    assert exact == 1.0 and compat == pytest.approx(0.8597, abs=1e-4)
    assert recompute(run, Mode.EXACT).tasks["ViDoRe_docvqa"].score == 1.0
    assert recompute(run, Mode.EXACT).tasks["ViDoRe_docvqa"].info == {}
    about = {"metric_mode": "compat", "score": 0.86, "interval": {"low": 0.86, "high": 0.86}}
    (tmp_path / "visdoc/ViDoRe_docvqa_info.json").write_text(json.dumps(about | {"pool": 9}))
    (again,) = find_runs([tmp_path])
    info = recompute(again, Mode.EXACT).tasks["ViDoRe_docvqa"].info
    assert (info["metric_mode"], info["score"], info["pool"]) == ("exact", 1.0, 9)
    assert info["interval"]["low"] == info["interval"]["high"] == 1.0


def rankings(folder: Path, predictions: list[str]) -> Path:
    write(folder, {"SUN397": 0.0})
    rows = [{"prediction": [p], "label": ["a"], "rel_scores": None} for p in predictions]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "image/SUN397_pred.jsonl").write_text(text)
    return folder


def test_comparison_is_paired(tmp_path: Path) -> None:
    a, b = find_runs(
        [
            rankings(tmp_path / "a", ["x"] * 40 + ["a"] * 60),
            rankings(tmp_path / "b", ["a"] * 100),
        ]
    )
    found = compare_runs(a, b)
    assert found.tasks["SUN397"].difference == pytest.approx(0.4)
    assert (found.tasks["SUN397"].wins, found.tasks["SUN397"].losses) == (40, 0)
    assert found.overall.low > 0 and found.tasks["SUN397"].p < 0.01
    (short,) = find_runs([rankings(tmp_path / "c", ["a"])])
    with pytest.raises(InvalidInputError, match="not the same"):
        compare_runs(a, short)


def test_folders_of_moments_on_another_machine_are_our_ids(tmp_path: Path) -> None:
    """As the reference writes them; ours, and all other data sets' ids, stay."""
    theirs = {
        "QVHighlight": ("/data/frames/v0/positive_0", "v0/positive_0"),
        "MomentSeeker": ("/data/frames/video_frames/movie_red", "movie_red"),
        "CIRR": ("images/dev/a.png:", "images/dev/a.png:"),
    }
    for folder, which in (("theirs", 0), ("ours", 1)):
        write(tmp_path / folder, dict.fromkeys(theirs, 1.0))
        for name, ids in theirs.items():
            row = {"prediction": [ids[which]], "label": ids[which], "rel_scores": None}
            (path,) = (tmp_path / folder).rglob(f"{name}_score.json")
            path.with_name(f"{name}_pred.jsonl").write_text(json.dumps(row))
            (found,) = outputs.read_predictions(path.with_name(f"{name}_pred.jsonl"), name)
            assert found.prediction == found.label == (ids[1],)
    a, b = find_runs([tmp_path / "theirs", tmp_path / "ours"])
    assert {d.difference for d in compare_runs(a, b).tasks.values()} == {0.0}


def test_bad_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="holds no result"):
        find_runs([tmp_path])
    with pytest.raises(NotFoundError, match="no folder"):
        find_runs([tmp_path / "x"])
    (tmp_path / "MSVD_score.json").write_text('{"ndcg": 1}')
    with pytest.raises(DataLossError, match="no number under 'hit@1', the metric of MSVD"):
        find_runs([tmp_path])
    for wrong in ("75.3", "-0.1", "NaN"):
        (tmp_path / "MSVD_score.json").write_text(f'{{"hit@1": {wrong}}}')
        with pytest.raises(DataLossError, match="expected a share from 0 to 1"):
            find_runs([tmp_path])
    (tmp_path / "MSVD_pred.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "MSVD_score.json").write_text('{"hit@1": 0.5}')
    (run,) = find_runs([tmp_path])
    with pytest.raises(DataLossError, match="MSVD_pred.jsonl cannot be read"):
        both_modes(run.tasks["MSVD"])
    (tmp_path / "MSVD_score.json").write_text("{")
    with pytest.raises(DataLossError, match="MSVD_score.json cannot be read"):
        find_runs([tmp_path])


def test_texts_with_other_separators_of_lines_stay_in_one_row(tmp_path: Path) -> None:
    """As texts from web pages do hold."""
    name = "a\u2028b\x85c\x0cd"
    row = {"prediction": [name], "label": [name], "rel_scores": None}
    path = tmp_path / "x_pred.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert [one.prediction for one in outputs.read_predictions(path)] == [(name,)]
    rows = "\n".join(json.dumps({"qry": one}, ensure_ascii=False) for one in (name, "e")) + "\r\n\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.jsonl").write_text(rows)
    with patch.object(files, "row_files", lambda *_: [tmp_path / "data/data.jsonl"]):
        found = list(files.read_rows(DATASETS[0], tmp_path))
    assert found == [{"qry": name}, {"qry": "e"}]
    ecrs = tmp_path / "ecrs.jsonl"
    said = {"task": "t", "side": "query", "id": "0", "ecr": f"Answer: {name}"}
    ecrs.write_text(json.dumps(said, ensure_ascii=False))
    assert Recorded(ecrs).rows == {("t", "query", "0"): f"Answer: {name}"}
