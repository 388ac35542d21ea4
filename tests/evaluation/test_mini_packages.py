"""Packages of data: found, downloaded, verified; and the tasks made of them, from slices."""

from __future__ import annotations

import io
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation import archives
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError, PreconditionError
from tte_jax.evaluation import mini
from tte_jax.evaluation.mini import clips, grounding, packages, pages, questions
from tte_jax.evaluation.mini.packages import Package, Registry
from tte_jax.evaluation.mmeb_v2.load import load

DATA = Package("some-data", Registry.DEBIAN, "MIT", megabytes=1)
NPM = Package("@some/data", Registry.NPM, "MIT", version="1.2.3", megabytes=1)
WHEEL = Package("some-data", Registry.PYPI, "MIT", version="1.0", megabytes=1)
FILES = {"usr/a.txt": b"one", "usr/b.txt": b"two"}


def png(colour: str, size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but for the shell; programs put there are the registries'."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    return place


def client(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_every_kind_of_archive_is_read(tmp_path: Path) -> None:
    archives.debian(tmp_path / "some-data_4%3a2.0-1_all.deb", FILES)
    archives.npm(tmp_path / "some-data-1.2.3.tgz", FILES)
    archives.wheel(tmp_path / "some_data-1.0-py3-none-any.whl", FILES)
    for package, version, prefix in (
        (DATA, "4:2.0-1", ""),
        (NPM, "1.2.3", "package/"),
        (WHEEL, "1.0", ""),
    ):
        found = packages.get(package, tmp_path)
        assert found.version == version and len(found.sha256) == 64
        assert found.file(f"{prefix}usr/b.txt") == b"two"
        names = [name for name, _ in found.files(lambda name: name.endswith("a.txt"))]
        assert names == [f"{prefix}usr/a.txt"]
        with pytest.raises(NotFoundError, match="holds no usr/c.txt"):
            found.file("usr/c.txt")


def test_it_is_downloaded_once(tmp_path: Path, clients: Path) -> None:
    made = archives.debian(tmp_path / "made.deb", FILES)
    # The client of the shell's own means: what it is asked for, and a copy.
    script = f'[ "$1 $2" = "download some-data" ] || exit 3\n/bin/cp {made} some-data_2.0_all.deb'
    client(clients, "apt-get", script)
    said: list[str] = []
    cache = tmp_path / "cache"
    assert packages.get(DATA, cache, said.append).version == "2.0"
    assert said == ["Downloading some-data from Debian: 1 MB, licence MIT"]
    (clients / "apt-get").unlink()
    assert packages.get(DATA, cache, said.append).file("usr/a.txt") == b"one"
    assert len(said) == 1, "the second time nothing is asked"


def test_what_cannot_be_had_is_named(tmp_path: Path, clients: Path) -> None:
    with pytest.raises(PreconditionError, match="needs npm, which is not here") as caught:
        packages.get(NPM, tmp_path)
    # The command to run, where, and the file to bring.
    for part in ("npm pack @some/data@1.2.3", str(tmp_path), "some-data-1.2.3.tgz"):
        assert part in caught.value.message
    client(clients, "apt-get", "echo 'E: Unable to locate package some-data' >&2; exit 100")
    with pytest.raises(PreconditionError, match="Unable to locate package.*apt-get update"):
        packages.get(DATA, tmp_path)
    client(clients, "npm", "exit 0")
    with pytest.raises(PreconditionError, match=r"left no some-data-1\.2\.3\.tgz"):
        packages.get(NPM, tmp_path)
    absent = Package("no-such-package-of-ours", Registry.INSTALLED, "MIT")
    with pytest.raises(PreconditionError, match="run `pip install no-such-package-of-ours`"):
        packages.get(absent, tmp_path)


def test_another_archive_than_the_pinned_one(tmp_path: Path) -> None:
    archives.npm(tmp_path / "some-data-1.2.3.tgz", FILES)
    with pytest.raises(DataLossError, match="expected 0000.*Delete it"):
        packages.get(replace(NPM, sha256="0000"), tmp_path)


def test_a_torn_archive(tmp_path: Path) -> None:
    for package, name in ((DATA, "some-data_1_all.deb"), (NPM, "some-data-1.2.3.tgz"),
                          (WHEEL, "some_data-1.0-py3-none-any.whl")):  # fmt: skip
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(DataLossError, match=f"{name} cannot be read"):
            packages.get(package, tmp_path).file("usr/a.txt")


# --- tasks of slices ---


def unpinned(name: str) -> mini.MiniTask:
    """A task whose packages may be any."""
    (task,) = mini.select([name])
    return replace(task, packages=tuple(replace(p, sha256="") for p in task.packages))


def test_shapes_ask_for_every_answer_in_turn(tmp_path: Path) -> None:
    asked = [["is it red?", "yes", 0], ["is it blue?", "no", 0], ["what colour?", "red", 0],
             ["is there a shape?", "yes", 1], ["is it green?", "yes", 1]]  # fmt: skip
    test = "easy_vqa/data/test"
    archives.wheel(
        tmp_path / "easy_vqa-1.0-py3-none-any.whl",
        {
            f"{test}/questions.json": json.dumps(asked).encode(),
            "easy_vqa/data/answers.txt": b"yes\nred\nno\n",
            f"{test}/images/0.png": png("red"),
            f"{test}/images/1.png": png("blue"),
        },
    )
    task = unpinned("mini-easy-vqa")
    manifest = mini.build(tmp_path / "data", [task], queries=4, cache=tmp_path)
    found = load(task.info, tmp_path / "data")
    assert [q.label for q in found.queries[:3]] == [("yes",), ("red",), ("no",)]
    assert all(set(q.pool or ()) == {"yes", "red", "no"} for q in found.queries)
    package = manifest["tasks"]["mini-easy-vqa"]["packages"]["easy-vqa"]
    assert package["version"] == "1.0" and len(package["sha256"]) == 64
    with pytest.raises(InvalidInputError, match="questions for at most 5"):
        mini.build(tmp_path / "more", [task], queries=6, cache=tmp_path)


def _map() -> dict[str, bytes]:
    """Five regions as squares of 40 pixels in a row, one of 10, a frontier."""
    image = Image.new("RGB", (260, 60), (0, 0, 0))
    divisions = ["<division><name>Frontier</name><ignore>yes</ignore><color><red>0</red>"
                 "<green>0</green><blue>0</blue></color></division>"]  # fmt: skip
    for i in range(6):
        side = 10 if i == 5 else 40
        image.paste((200, i, 7), (5 + 45 * i, 5, 5 + 45 * i + side, 5 + side))
        capital = "<capital>C0</capital>" if i == 0 else ""
        divisions.append(
            f"<division><name>R{i}</name>{capital}<color><red>200</red><green>{i}</green>"
            "<blue>7</blue></color></division>"
        )
    out = io.BytesIO()
    image.save(out, "PNG")
    place = "usr/share/kgeography"
    text = f"<map><mapFile>m.png</mapFile><name>M</name>{''.join(divisions)}</map>"
    return {f"{place}/m.kgm": text.encode(), f"{place}/m.png": out.getvalue()}


def test_regions_are_boxes_of_their_colour(tmp_path: Path) -> None:
    found = {r.name: r for r in grounding.regions(_map(), "usr/share/kgeography/m.kgm")}
    # The small one is left out, the frontier is no region.
    assert sorted(found) == ["R0", "R1", "R2", "R3", "R4"]
    assert found["R2"].box == (95, 5, 135, 45) and found["R0"].capital == "C0"
    archives.debian(tmp_path / "kgeography-data_1_all.deb", _map())
    (task,) = mini.select(["mini-maps"])
    mini.build(tmp_path / "data", [task], queries=5, cache=tmp_path)
    texts = set()
    for query in load(task.info, tmp_path / "data").queries:
        texts.add(text := query.load().text)
        with Image.open(tmp_path / "data/image-tasks" / query.label[0].rstrip(":")) as part:
            # The middle of the part is the region that was asked for.
            assert part.getpixel((part.width // 2, part.height // 2)) == (200, int(text[1]), 7)
    assert texts == {"R0, capital C0", "R1", "R2", "R3", "R4"}
    with pytest.raises(InvalidInputError, match="regions for at most 5"):
        mini.build(tmp_path / "more", [task], queries=6, cache=tmp_path)


def test_animations_and_their_frames(tmp_path: Path) -> None:
    def webp(colours: list[str]) -> bytes:
        out = io.BytesIO()
        first, *more = [Image.new("RGBA", (32, 32), colour) for colour in colours]
        first.save(out, "WEBP", save_all=True, append_images=more, lossless=True)
        return out.getvalue()

    files = {
        "assets/1f436.webp": webp(["red", "blue"] * 10),
        "assets/1f431.webp": webp(["green", "blue", "red"]),
        "assets/1f344.webp": webp(["red"]),  # a still
        "assets/1f44b-1f3fb.webp": webp(["red", "blue"]),  # a skin tone
        "assets/nothing.txt": b"",
    }
    archives.npm(tmp_path / "lobehub-fluent-emoji-anim-1-1.0.0.tgz", files)
    for name in ("mini-clips", "mini-clip-names"):
        task = unpinned(name)
        mini.build(tmp_path / "data", [task], queries=2, cache=tmp_path)
        found = load(task.info, tmp_path / "data")
        assert len(found.queries) == 2 and len(list(found.candidates())) == 2
    frames = tmp_path / "data/video-tasks/frames/video_ret/mini-clips"
    assert len(list((frames / "1F436").iterdir())) == clips.FRAMES
    assert len(list((frames / "1F431").iterdir())) == 3
    with Image.open(frames / "1F431/0000.jpg") as frame:
        red, green, blue = frame.getpixel((16, 16))  # pyright: ignore
        assert green > 100 and red < 30 and blue < 30
    with pytest.raises(InvalidInputError, match="animations for at most 2"):
        mini.build(tmp_path / "more", [unpinned("mini-clips")], queries=3, cache=tmp_path)


def test_a_manual_with_grades_and_a_pool(tmp_path: Path) -> None:
    def topic(name: str, said: list[str]) -> list[str]:
        return [f"{name} Title of {name}", "Description", *said, "Usage", f"{name}\\(x\\)"]

    lines = [
        ["Contents"],
        topic("alpha", ["Sorts things", "by size."]) + topic("beta", ["Counts them."]),
        ["more of beta"],
        topic("gamma", ["x " * 400]),
        ["delta without a description"],
    ]
    outline = [("alpha", 1), ("beta", 1), ("gamma", 3), ("delta", 4)]
    data = archives.manual(lines, outline)
    archives.debian(tmp_path / "r-doc-pdf_9_all.deb", {pages.FILE: data})
    with pages._opened(data) as document:
        topics = {t.name: t for t in pages.topics(document)}
        assert topics.keys() == {"alpha", "beta", "gamma"}
        assert topics["alpha"].description == "Sorts things by size."
        assert (topics["beta"].page, topics["beta"].more) == (1, (2,))
        assert len(topics["gamma"].description) <= pages.LONGEST
        assert pages.drawn(document, 0).mode == "L"
    (task,) = mini.select(["mini-manual"])
    mini.build(tmp_path / "data", [task], queries=3, pages=4, cache=tmp_path)
    found = load(task.info, tmp_path / "data")
    asked = {q.load().text[:6]: (q.label, q.rel_scores) for q in found.queries}
    assert asked["Counts"] == (("1", "2"), (2, 1)) and asked["Sorts "] == (("1",), (2,))
    pool = [item.name for item in found.candidates()]
    assert len(pool) == 4 and {"1", "2", "3"} <= set(pool)
    with pytest.raises(InvalidInputError, match="--pages is 2; 3 queries have 3 right pages"):
        mini.build(tmp_path / "few", [task], queries=3, pages=2, cache=tmp_path)
    with pytest.raises(InvalidInputError, match="topics for at most 3"):
        mini.build(tmp_path / "few", [task], queries=4, cache=tmp_path)
    with pytest.raises(InvalidInputError, match="with 4 pages, and 0 were asked for"):
        mini.build(tmp_path / "data", [task], queries=3, cache=tmp_path)


def test_a_manual_that_is_none(tmp_path: Path) -> None:
    archives.debian(tmp_path / "r-doc-pdf_9_all.deb", {pages.FILE: b"no PDF"})
    with pytest.raises(DataLossError, match="r-doc-pdf cannot be read"):
        mini.build(tmp_path / "data", mini.select(["mini-manual"]), queries=2, cache=tmp_path)


def test_the_packages_are_pinned_where_they_can_be() -> None:
    found = {p.name: p for task in mini.TASKS for p in task.downloads}
    assert found.keys() == {
        questions.EASY_VQA.name,
        clips.FLUENT.name,
        grounding.KGEOGRAPHY.name,
        pages.R_MANUAL.name,
    }
    for package in found.values():
        assert package.megabytes and package.licence
        pinned = package.registry is not Registry.DEBIAN
        assert (len(package.sha256) == 64) == pinned and bool(package.version) == pinned
    assert os.sep not in "".join(p.pattern for p in found.values())
