"""Every reader on tiny folders in exactly the published layouts, all 78 names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation import layouts
from tte_jax.content import MediaKind
from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation.mmeb_v2.files import MissingDataError, row_files
from tte_jax.evaluation.mmeb_v2.frames import encode, frame_paths
from tte_jax.evaluation.mmeb_v2.load import load, read_instructions, what_is_missing
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DATASETS
from tte_jax.preprocess.video import probe_video, sampled_frames
from tte_jax.preprocess.video_config import VideoConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_all(tmp_path_factory.mktemp("mmeb"))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_data_set_is_read(name: str, root: Path) -> None:
    info = BY_NAME[name]
    assert what_is_missing([info], root) == []
    task = load(info, root)
    names = [item.name for item in task.candidates()]
    assert len(task.queries) == (20 if name == "MVBench" else 3)
    assert len(set(names)) == len(names) >= 2
    for query in task.queries:
        assert not query.load().empty
        pool = names if query.pool is None else query.pool
        assert set(query.label) <= set(pool) <= set(names)
        assert len(set(pool)) == len(pool)
        assert (query.pool is None) == (info.pool == "global")
        assert (query.rel_scores is not None) == (info.modality == "visdoc")
    assert all(not item.load().empty for item in task.candidates())


def test_image_rows(root: Path) -> None:
    task = load(BY_NAME["SUN397"], root)
    query = task.queries[1]
    assert query.label == ("green",) and query.pool == ("green", "red", "blue")
    assert query.instruction == "Say its colour."
    assert query.load().media[0].data == layouts.picture("green")
    assert [i.load().text for i in task.candidates()] == ["red", "green", "blue"]


def test_image_candidates_are_keyed_by_path_and_caption(root: Path) -> None:
    task = load(BY_NAME["RefCOCO-Matching"], root)
    item = next(task.candidates())
    assert item.name == "shared/red.png:red thing"
    assert item.instruction == "Show the image."
    assert item.load().text == '"red thing"' and len(item.load().media) == 1
    (bare, *_) = load(BY_NAME["NIGHTS"], root).candidates()
    assert bare.name == "shared/red.png:" and bare.load().text == ""
    assert next(load(BY_NAME["MSCOCO_t2i"], root).candidates()).name == "shared/red.png"


def test_page_grades(root: Path) -> None:
    task = load(BY_NAME["ViDoRe_docvqa"], root)
    first = task.queries[0]
    assert (first.id, first.label, first.rel_scores) == ("0", ("0", "1"), (2, 1))
    assert [i.name for i in task.candidates()] == ["0", "1", "2"]


def test_frames_are_spread_evenly_and_survive_encoding(tmp_path: Path) -> None:
    for i in (10, 9, 100, 1):
        (tmp_path / f"f{i}.png").write_bytes(layouts.picture(layouts.COLOURS[i % 3]))
    assert [p.stem for p in frame_paths(tmp_path)] == ["f1", "f9", "f10", "f100"]
    assert [p.stem for p in frame_paths(tmp_path, 3)] == ["f1", "f9", "f100"]
    assert len(frame_paths(tmp_path, 8)) == 4
    data = encode(frame_paths(tmp_path))
    # What was reasoned about a video is found again by its content.
    assert encode(frame_paths(tmp_path)) == data
    info = probe_video(data)
    assert (info.frames, info.fps, info.width, info.height) == (4, 2.0, 32, 32)
    import numpy as np

    seen = list(sampled_frames(data, np.arange(4), info))
    assert [f.getpixel((5, 5)) for f in seen] == [
        (0, 128, 0),
        (255, 0, 0),
        (0, 128, 0),
        (0, 128, 0),
    ]


@pytest.mark.parametrize("config", [VideoConfig(), VideoConfig.qwen3_vl()])
def test_processors_look_at_exactly_the_frames_of_the_folder(config: VideoConfig) -> None:
    assert config.sample(8, 2.0).tolist() == list(range(8))


def test_video_questions_in_the_benchmarks_form(root: Path) -> None:
    mvbench = load(BY_NAME["MVBench"], root).queries[1]
    assert mvbench.load().text == "What colour\nOptions:\n(A) red\n(B) green\n(C) blue"
    assert mvbench.label == ("(B) green",)
    task = load(BY_NAME["Video-MME"], root)
    assert task.queries[0].load().text.startswith("What colour\nA. red.\nB. green.")
    assert [(i.name, i.load().text) for i in task.candidates()][0] == ("A. red.", "red")
    yes = load(BY_NAME["ActivityNetQA"], root).queries[0]
    assert yes.load().text == "is it red? (A) yes; (B) no." and yes.label == ("yes",)


def test_moments(root: Path) -> None:
    query = load(BY_NAME["QVHighlight"], root).queries[0]
    assert query.label == ("v0/positive_0",)
    assert query.pool == ("v0/negative_0", "v0/negative_1", "v0/positive_0")
    kinds = [[m.kind for m in q.load().media] for q in load(BY_NAME["MomentSeeker"], root).queries]
    assert kinds == [[], [MediaKind.IMAGE], [MediaKind.VIDEO]]


def test_limit_cuts_queries_and_not_the_pool(root: Path) -> None:
    for name in ("MSVD", "HMDB51", "ViDoRe_docvqa"):
        task = load(BY_NAME[name], root, limit=1)
        assert len(task.queries) == 1 and len(list(task.candidates())) == 3


def test_classes_that_do_not_occur_are_noted(root: Path) -> None:
    assert "3 classes that occur in the rows, of 101" in load(BY_NAME["UCF101"], root).notes[0]


def test_an_empty_folder_gives_a_list_of_what_to_get(tmp_path: Path) -> None:
    lacking = what_is_missing(DATASETS, tmp_path)
    assert {m.task for m in lacking} == set(BY_NAME)
    text = "\n".join(m.sentence() for m in lacking)
    assert "hf download --repo-type dataset ziyjiang/MMEB_Test_Instruct" in text
    assert "the folder video-tasks/frames/video_cls/SSv2 of its frames" in text
    assert f"Looked in {tmp_path}" in text


def test_media_that_rows_name_and_that_lack_are_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "ziyjiang", tmp_path / "ziyjiang")
    shutil.copytree(root / "image-tasks", tmp_path / "image-tasks")
    (tmp_path / "image-tasks/shared/blue.png").unlink()
    with pytest.raises(MissingDataError, match="1 media files .*blue.png"):
        load(BY_NAME["SUN397"], tmp_path)


def test_other_places_of_the_same_files(root: Path, tmp_path: Path) -> None:
    source = root / "vidore/docvqa_test_subsampled_beir"
    places = (
        "docvqa_test_subsampled_beir",
        "hub/datasets--vidore--docvqa_test_subsampled_beir/snapshots/abc",
        "visdoc-tasks/docvqa_test_subsampled_beir",
    )
    for number, place in enumerate(places):
        shutil.copytree(source, tmp_path / str(number) / place)
        assert len(load(BY_NAME["ViDoRe_docvqa"], tmp_path / str(number)).queries) == 3


def test_the_readme_says_where_files_lie(root: Path, tmp_path: Path) -> None:
    source = root / "VLM2Vec/MSVD/data/test-00000-of-00001.parquet"
    target = tmp_path / "VLM2Vec/MSVD"
    (target / "odd").mkdir(parents=True)
    shutil.copy(source, target / "odd/rows.parquet")
    shutil.copytree(root / "video-tasks", tmp_path / "video-tasks")
    (target / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: test\n    path: odd/*.parquet\n---\n# MSVD\n"
    )
    assert len(load(BY_NAME["MSVD"], tmp_path).queries) == 3


def test_a_readme_that_names_files_alone_means_the_split_train(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "VLM2Vec/MVBench", tmp_path / "VLM2Vec/MVBench")
    readme = tmp_path / "VLM2Vec/MVBench/README.md"
    header = "---\nconfigs:\n- config_name: action_sequence\n  data_files:"
    info = replace(BY_NAME["MVBench"], configs=("action_sequence",))
    for files in (" json/action_sequence.json\n", "\n  - json/action_seq*.json\n"):
        readme.write_text(header + files + "---\n")
        (found,) = row_files(info, "action_sequence", tmp_path)
        assert found.name == "action_sequence.json"
    with pytest.raises(MissingDataError):
        row_files(replace(info, split="test"), "action_sequence", tmp_path)


def test_broken_files_are_named(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "vidore/docvqa_test_subsampled_beir"
    shutil.copytree(root / "vidore/docvqa_test_subsampled_beir", target)
    (target / "qrels/test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataLossError, match=r"qrels/test-00000.*cannot be read"):
        load(BY_NAME["ViDoRe_docvqa"], tmp_path)
    layouts.parquet(target / "qrels/test-00000-of-00001.parquet", [{"query-id": 1, "score": 1}])
    with pytest.raises(DataLossError, match="no column 'corpus-id'; it has query-id, score"):
        load(BY_NAME["ViDoRe_docvqa"], tmp_path)


def test_instructions_file(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    path.write_text('{"MSVD": {"query": "Find it."}}')
    task = load(BY_NAME["MSVD"], root, instructions=read_instructions(path))
    assert task.queries[0].instruction == "Find it."
    assert next(task.candidates()).instruction == BY_NAME["MSVD"].target_instruction
    path.write_text('{"MSVD": "Find it."}')
    with pytest.raises(InvalidInputError, match="MSVD must have texts under query and target"):
        read_instructions(path)
