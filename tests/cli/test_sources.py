"""Reading images, folders and manifests: ids, metadata, duplicates, and bad files named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tte_jax.cli import sources
from tte_jax.errors import InvalidInputError, NotFoundError

NO_RULES = sources.MetadataRules({}, {})


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def collect(paths: list[Path], rules: sources.MetadataRules = NO_RULES, prefix: str = ""):
    files, _ = sources.find(paths)
    return list(sources.without_duplicates(sources.read(files, rules, prefix=prefix)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    (root / "b.png").write_bytes(png("red"))
    (root / "a.PNG").write_bytes(png("blue"))
    (root / "sub" / "c.png").write_bytes(png("green"))
    (root / "notes.txt").write_text("not an image")
    return root


def test_a_folder_gives_its_images_in_order_with_paths_as_ids(folder: Path) -> None:
    files, others = sources.find([folder])
    assert [name for _, name in files] == ["a.PNG", "b.png", "sub/c.png"]
    assert others == 1
    items = collect([folder], prefix="mine/")
    assert [i.document.id for i in items] == ["mine/a.PNG", "mine/b.png", "mine/sub/c.png"]
    assert items[1].document.content.media[0].data == png("red")
    assert items[1].document.content.text == ""


def test_copies_are_left_out_and_an_id_cannot_mean_two_things(folder: Path, tmp_path) -> None:
    (folder / "copy.png").write_bytes(png("red"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.png").write_bytes(png("black"))
    items = collect([folder, other])
    assert items[2] is None
    assert isinstance(items[-1], sources.BadSource)
    assert "'b.png'" in items[-1].message
    assert len([i for i in items if isinstance(i, sources.Item)]) == 3


def test_the_same_picture_with_other_metadata_is_another_document(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    manifest = tmp_path / "m.jsonl"
    lines = [{"id": f"d{n}", "image": "a.png", "metadata": {"n": n}} for n in (1, 2)]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    assert [i.document.id for i in collect([manifest])] == ["d1", "d2"]


def test_metadata_of_the_file_wins_over_the_shared(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.json"
    table.write_text(json.dumps({"b.png": {"colour": "red"}, "c.png": {"colour": "green"}}))
    rules = sources.MetadataRules(
        {"colour": "unknown", "year": 2024}, sources.read_metadata_file(table)
    )
    found = {i.document.id: dict(i.document.metadata) for i in collect([folder], rules)}
    assert found == {
        "a.PNG": {"colour": "unknown", "year": 2024},
        "b.png": {"colour": "red", "year": 2024},
        "sub/c.png": {"colour": "green", "year": 2024},
    }


def test_a_manifest_names_texts_and_images_beside_itself(folder: Path) -> None:
    manifest = folder / "docs.jsonl"
    rows = [
        {"id": "t", "text": "only words", "metadata": {"kind": "note"}},
        {"image": "sub/c.png", "text": "green"},
        {"id": "two", "images": ["a.PNG", "b.png"]},
    ]
    manifest.write_text("\n\n".join(map(json.dumps, rows)))
    text, image, two = collect([manifest], prefix="p:")
    assert (text.document.id, text.document.content.text) == ("p:t", "only words")
    assert dict(text.document.metadata) == {"kind": "note"}
    assert image.document.id == "p:sub/c.png"
    assert len(two.document.content.media) == 2
    assert text.source.endswith("docs.jsonl:1") and image.source.endswith("docs.jsonl:3")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": "x"}', "neither text nor image"),
        ('{"text": "x"}', "id is missing"),
        ('{"id": "x", "image": "absent.png"}', "absent.png does not exist"),
        ('{"id": "x", "image": "empty.png"}', "empty"),
        ('{"id": "x", "image": 3}', "file name"),
        ('{"id": "x", "text": 3}', "text must be"),
        ('{"id": "x", "text": "a", "metadata": {"k": [1]}}', "texts, numbers"),
        ('{"id": "x", "text": "a", "label": "b"}', "label"),
        ('{"id": "x", "image": "a", "images": ["b"]}', "not both"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_rest_goes_on(
    tmp_path: Path, line: str, named: str
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(line + '\n{"id": "ok", "text": "fine"}\n')
    bad, good = collect([manifest])
    assert isinstance(bad, sources.BadSource) and isinstance(good, sources.Item)
    assert bad.source == f"{manifest}:1"
    assert named in bad.message


def test_an_image_to_search_with_must_be_one(tmp_path: Path) -> None:
    good, empty, junk, cut = (tmp_path / n for n in ("good.png", "empty.png", "junk", "cut.png"))
    good.write_bytes(png("red"))
    empty.write_bytes(b"")
    junk.write_bytes(b"not an image at all")
    cut.write_bytes(png("red")[:40])
    assert sources.read_image(good) == png("red")
    for path in (empty, junk, cut, tmp_path):
        with pytest.raises(InvalidInputError, match=str(path)):
            sources.read_image(path)
    with pytest.raises(NotFoundError, match=r"absent\.png"):
        sources.read_image(tmp_path / "absent.png")


def test_a_file_too_large_to_send_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(sources.MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidInputError, match="at most"):
        sources.read_file(path)


def test_a_missing_path_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        sources.find([tmp_path / "nowhere"])


def test_metadata_files_must_be_objects_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for text in ("[]", '{"a.png": 3}', "{"):
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=r"m\.json"):
            sources.read_metadata_file(path)
