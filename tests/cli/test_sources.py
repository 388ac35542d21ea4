"""Reading images, folders and manifests: ids, metadata, duplicates, and bad files named."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tte_jax import limits
from tte_jax.cli import files, sources
from tte_jax.content import MediaKind
from tte_jax.errors import InvalidInputError, NotFoundError

NO_RULES = sources.MetadataRules({}, {})


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pdf(*colours: str) -> bytes:
    """A PDF with a page of each colour."""
    pages = [Image.new("RGB", (20, 30), colour) for colour in colours]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def collect(paths: list[Path], rules: sources.MetadataRules = NO_RULES, prefix: str = ""):
    found, _ = sources.find(paths)
    return list(sources.without_duplicates(sources.read(found, rules, prefix=prefix)))


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
    found, others = sources.find([folder])
    assert [name for _, name in found] == ["a.PNG", "b.png", "sub/c.png"]
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
        ('{"id": "x", "video": 3}', "video must be"),
        ('{"id": "x", "text": "a", "page": 1}', "beside pdf"),
        ('{"id": "x", "pdf": "two.pdf", "page": 3}', "2 pages"),
        ('{"id": "x", "pdf": "two.pdf", "page": true}', "whole number"),
        ('{"id": "x", "pdf": "two.pdf", "images": ["two.pdf"]}', "stands alone"),
        ('{"id": "x", "pdf": "empty.png"}', "empty"),
        ("[" * 100_000, "not JSON"),
        (r'{"id": "x", "text": "half of an emoji \ud83d"}', "no Unicode text"),
        (r'{"id": "\ud83d", "text": "x"}', "no Unicode text"),
        ('{"id": "x", "text": "a", "metadata": {"n": 12345678901234567890}}', "metadata['n']"),
        (r'{"id": "x", "image": "a\u0000.png"}', "no name that a file can have"),
        ('{"id": "x", "images": ["half.tif", "half.tif"]}', "can be sent"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_rest_goes_on(
    tmp_path: Path, line: str, named: str
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "two.pdf").write_bytes(pdf("red", "blue"))
    with (tmp_path / "half.tif").open("wb") as large:
        large.truncate(limits.MAX_MESSAGE_BYTES // 2)
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
    assert files.read_image(good) == png("red")
    for path in (empty, junk, cut, tmp_path):
        with pytest.raises(InvalidInputError, match=str(path)):
            files.read_image(path)
    with pytest.raises(NotFoundError, match=r"absent\.png"):
        files.read_image(tmp_path / "absent.png")


def test_a_file_too_large_to_send_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(files.MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidInputError, match="at most"):
        files.read_file(path)


def test_a_missing_path_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        sources.find([tmp_path / "nowhere"])


def test_metadata_files_must_be_objects_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for text in ("[]", '{"a.png": 3}', "{"):
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=r"m\.json"):
            sources.read_metadata_file(path)


def test_a_pdf_is_a_document_a_page_and_a_video_is_one(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "doc.PDF").write_bytes(pdf("red", "blue", "green"))
    (tmp_path / "film.mp4").write_bytes(b"any bytes")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    rules = sources.MetadataRules({"kind": "report"}, {"sub/doc.PDF": {"year": 2026}})
    bad, film, *pages = collect([tmp_path], rules)
    assert "broken.pdf" in bad.message and bad.source.endswith("broken.pdf")
    assert film.document.content.media[0].kind is MediaKind.VIDEO
    assert [p.document.id for p in pages] == [f"sub/doc.PDF#page={n}" for n in (1, 2, 3)]
    assert dict(pages[1].document.metadata) == {
        "page": 2, "pages": 3, "kind": "report", "year": 2026,
    }  # fmt: skip
    (page,) = pages[1].document.content.media
    assert page.kind is MediaKind.PAGE and page.page == 0
    assert len({p.document.content.content_hash for p in pages}) == 3
    # The same file gives the same documents, so that a second run finds them stored.
    again = collect([tmp_path], rules)
    assert [p.document for p in again[2:]] == [p.document for p in pages]


def test_a_manifest_names_pdfs_pages_and_videos(tmp_path: Path) -> None:
    (tmp_path / "doc.pdf").write_bytes(pdf("red", "blue"))
    (tmp_path / "film.webm").write_bytes(b"any bytes")
    manifest = tmp_path / "m.jsonl"
    rows = [
        {"id": "whole", "pdf": "doc.pdf", "text": "a report", "metadata": {"year": 2026}},
        {"pdf": "doc.pdf", "page": 2, "text": "the second"},
        {"id": "clip", "video": "film.webm", "text": "words"},
    ]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    one, two, second, clip = collect([manifest])
    assert (one.document.id, two.document.id) == ("whole#page=1", "whole#page=2")
    assert one.document.content.text == "a report"
    assert dict(two.document.metadata) == {"page": 2, "pages": 2, "year": 2026}
    assert one.source.endswith("m.jsonl:1, page 1")
    assert second.document.id == "doc.pdf#page=2"
    assert clip.document.content.media[0].kind is MediaKind.VIDEO


def test_a_manifest_is_read_line_by_line_however_large_it_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tte_jax.cli.manifests.MAX_FILE_BYTES", 60)
    manifest = tmp_path / "m.jsonl"
    good = [json.dumps({"id": f"d{n}", "text": f"text {n}"}) for n in range(50)]
    manifest.write_text("\n".join([*good[:25], '{"id": "x", "text": "' + "y" * 200, *good[25:]]))
    items = collect([manifest])
    assert isinstance(items[25], sources.BadSource) and items[25].source.endswith(":26")
    assert "more than 60 bytes" in items[25].message
    assert len([i for i in items if isinstance(i, sources.Item)]) == 50


def test_a_name_in_another_encoding_is_told_and_the_rest_goes_on(folder: Path) -> None:
    """As old archives hold them: on Linux a name is bytes."""
    named = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(named)).write_bytes(png("white"))
    items = collect([folder])
    (bad,) = (item for item in items if isinstance(item, sources.BadSource))
    assert "rename the file" in bad.message and len(items) == 4
    assert bad.source.encode().endswith(b"caf\\udce9.png") and bad.message.encode()
