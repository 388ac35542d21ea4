"""The emoji data set: attributes, splits, restyling and the build, on inline fixtures."""

from __future__ import annotations

import colorsys
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.data import emoji, packages, restyle, splits
from training.data.concepts import Concept, build_concepts, family_key, normalise_key
from training.data.icons import Icon, build_name_index, match_icons, read_icons
from training.data.render import SIZE, ink, render

TONES = ["1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]
TONE_NAMES = ["light", "medium-light", "medium", "medium-dark", "dark"]
GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "3": "animals-nature", "9": "flags"},
    "subgroups": {
        "0": "face-smiling", "14": "heart", "20": "hands", "23": "person", "25": "person-role",
        "27": "person-activity", "30": "family", "35": "animal-bird", "99": "subdivision-flag",
    },
}  # fmt: skip


def entry(hexcode: str, label: str, group: int, subgroup: int, **more: Any) -> dict[str, Any]:
    points = [chr(int(p, 16)) for p in hexcode.split("-")]
    return {
        "hexcode": hexcode, "label": label, "group": group, "subgroup": subgroup,
        "emoji": "".join(points), "tags": label.split(), **more,
    }  # fmt: skip


def toned(hexcode: str, label: str, group: int, subgroup: int, rest: str = "") -> dict[str, Any]:
    """An entry with five single-tone variants; the tone follows the first code point."""
    skins = [
        entry(f"{hexcode}-{tone}{rest}", f"{label}: {name} skin tone", group, subgroup, tone=i + 1)
        for i, (tone, name) in enumerate(zip(TONES, TONE_NAMES, strict=True))
    ]
    return entry(hexcode + rest, label, group, subgroup, skins=skins)


def make_concepts() -> list[Concept]:
    data = [
        entry("1F600", "grinning face", 0, 0),
        entry("2764-FE0F", "red heart", 0, 14),
        toned("1F9D1", "technologist", 1, 25, "-200D-1F4BB"),
        toned("1F468", "man technologist", 1, 25, "-200D-1F4BB"),
        toned("1F469", "woman technologist", 1, 25, "-200D-1F4BB"),
        toned("1F9D1", "person", 1, 23),
        toned("1F469", "woman: red hair", 1, 23, "-200D-1F9B0"),
        toned("1F471", "woman: blond hair", 1, 23, "-200D-2640-FE0F"),
        toned("1F3C3", "person running", 1, 27),
        toned("1F3C3", "woman running facing right", 1, 27, "-200D-2640-FE0F-200D-27A1-FE0F"),
        toned("1F57A", "man dancing", 1, 27),
        toned("1F483", "woman dancing", 1, 27),
        toned("1F44F", "clapping hands", 1, 20),
        {
            **toned("1F91D", "handshake", 1, 20),
            "skins": [
                entry("1FAF1-1F3FF-200D-1FAF2-1F3FE", "handshake: dark skin tone, medium-dark skin "
                      "tone", 1, 20, tone=[5, 4]),
            ],
        },
        entry("1F468-200D-1F469-200D-1F467", "family: man, woman, girl", 1, 30),
        entry("1F426", "bird", 3, 35),
        entry("1F426-200D-2B1B", "black bird", 3, 35),
        entry("1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", "flag: Wales", 9, 99),
    ]  # fmt: skip
    shortcodes = [{"1F600": "grinning"}, {"1F600": ["grinning", "gleeful"]}]
    return build_concepts(data, GROUPS, shortcodes)


@pytest.fixture(scope="module")
def concepts() -> dict[str, Concept]:
    return {c.key: c for c in make_concepts()}


def test_woman_technologist_with_dark_skin(concepts: dict[str, Concept]) -> None:
    concept = concepts["1f469-1f3ff-200d-1f4bb"]
    assert concept.emoji == "\U0001f469\U0001f3ff\u200d\U0001f4bb"
    assert (concept.gender, concept.skin, concept.hair) == ("woman", "dark", "none")
    assert concept.name == "technologist"
    assert concept.label == "woman technologist: dark skin tone"
    assert concept.family == "1f9d1-200d-1f4bb"
    assert concept.base == "1f469-200d-1f4bb"
    assert concept.combination == "1f9d1-200d-1f4bb|woman|dark"
    assert (concept.group, concept.subgroup) == ("people-body", "person-role")
    members = [c for c in concepts.values() if c.family == concept.family]
    assert len(members) == 18
    assert {c.name for c in members} == {"technologist"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("1f469-1f3fd-200d-1f9b0", ("1f9d1", "woman", "medium", "red hair", "none", "person")),
        ("1f471-200d-2640", ("1f9d1", "woman", "none", "blond hair", "none", "person")),
        (
            "1f3c3-1f3fb-200d-2640-200d-27a1",
            ("1f3c3", "woman", "light", "none", "right", "running"),
        ),
        ("1f483-1f3fe", ("1f57a", "woman", "medium-dark", "none", "none", "dancing")),
        ("1f57a", ("1f57a", "man", "none", "none", "none", "dancing")),
        ("1f44f-1f3fc", ("1f44f", "none", "medium-light", "none", "none", "clapping hands")),
        ("1f600", ("1f600", "none", "none", "none", "none", "grinning face")),
        # Outside the people group nothing is stripped: a black bird is not a bird's variant.
        ("1f426-200d-2b1b", ("1f426-200d-2b1b", "none", "none", "none", "none", "black bird")),
    ],
)
def test_attributes(concepts: dict[str, Concept], key: str, expected: tuple[str, ...]) -> None:
    c = concepts[key]
    assert (c.family, c.gender, c.skin, c.hair, c.direction, c.name) == expected
    assert not c.multi_person


def test_two_tones_are_marked(concepts: dict[str, Concept]) -> None:
    concept = concepts["1faf1-1f3ff-200d-1faf2-1f3fe"]
    assert concept.multi_person
    assert concept.tones == (5, 4)
    assert concept.skin == "none"
    assert (concept.base, concept.family) == ("1f91d", "1f91d")


def test_families_and_texts(concepts: dict[str, Concept]) -> None:
    family = concepts["1f468-200d-1f469-200d-1f467"]
    assert (family.family, family.gender, family.multi_person) == ("1f46a", "none", True)
    assert concepts["2764"].hexcode == "2764-FE0F"
    assert concepts["1f600"].shortcodes == ("grinning", "gleeful")
    flag = concepts["1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"]
    assert flag.name == "flag of wales"
    assert Concept.from_json(json.loads(json.dumps(family.to_json()))) == family


def test_keys() -> None:
    assert normalise_key("2764_FE0F") == "2764"
    assert family_key("1f469-1f3fb-200d-2764-200d-1f468-1f3ff", people=True) == "1f491"
    assert family_key("1f44d-1f3fb", people=True) == "1f44d"


SQUARE = '<path fill="#{:06x}" d="M2 2h12v9H2z"/>'
CANVAS = '<path fill="none" d="M0 0h16v16H0z"/>'


def make_set(names: dict[str, str], aliases: dict[str, Any]) -> dict[str, Any]:
    return {
        "prefix": "x", "width": 16, "height": 16, "aliases": aliases,
        "icons": {n: {"body": CANVAS + body} for n, body in names.items()},
    }  # fmt: skip


def test_icons_match_by_code_point_and_by_name(concepts: dict[str, Concept]) -> None:
    drawn = make_set({"happy-old-name": "<g/>", "red-heart": "<g/>", "logo": "<g/>"}, {})
    chars = {"1f600": "happy-old-name", "2764-fe0f": "red-heart", "e000": "logo"}
    index = build_name_index(list(concepts.values()), {"1F426": "BIRD SIGN"}, [(drawn, chars)])
    named = make_set(
        {"happyoldname": "<g/>", "birdsign": "<g/>", "clapping-hands-dark-skin-tone": "<g/>",
         "flag-for-wales": "<g/>", "logo": "<g/>"},
        {"gleeful": {"parent": "happyoldname"}},
    )  # fmt: skip
    by_chars = match_icons(list(concepts.values()), drawn, chars, index)
    assert {k: i.name for k, i in by_chars.items()} == {
        "1f600": "happy-old-name",
        "2764": "red-heart",
    }
    by_name = match_icons(list(concepts.values()), named, {}, index)
    assert {k: i.name for k, i in by_name.items()} == {
        "1f600": "happyoldname",
        "1f426": "birdsign",
        "1f44f-1f3ff": "clapping-hands-dark-skin-tone",
        "1f3f4-e0067-e0062-e0077-e006c-e0073-e007f": "flag-for-wales",
    }


def test_ambiguous_names_match_nothing(concepts: dict[str, Concept]) -> None:
    drawn = make_set({"a": "<g/>", "b": "<g/>"}, {})
    index = build_name_index(
        list(concepts.values()), {"1F426": "TWIN", "1F600": "TWIN"}, [(drawn, {})]
    )
    assert index.find("twin") is None


def test_flipped_alias_is_mirrored() -> None:
    left = '<path fill="#000" d="M0 0h4v16H0z"/>'
    icons = read_icons(make_set({"left": left}, {"right": {"parent": "left", "hFlip": True}}))
    image = render(icons["left"], icons["left"].body)
    mirrored = render(icons["right"], icons["right"].body)
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert image[:, : SIZE // 2].mean() < image[:, SIZE // 2 :].mean()
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


def test_hash_is_stable() -> None:
    # Moving these numbers would move the hold-out under every published figure.
    assert splits.fraction("family", "1f600") == pytest.approx(0.4630971660442269, abs=1e-12)
    assert splits.fraction("combination", "1f44f|none|dark") == pytest.approx(
        0.3782181664026081, abs=1e-12
    )


def test_committed_splits_are_what_the_hash_draws(concepts: dict[str, Concept]) -> None:
    held_out = splits.read()
    assert all(splits.fraction("family", f) < splits.FAMILY_RATE for f in held_out.families)
    assert all(
        splits.fraction("combination", c) < splits.COMBINATION_RATE for c in held_out.combinations
    )
    assert not {c.split("|")[0] for c in held_out.combinations} & held_out.families
    assert not any(c.endswith("|none") for c in held_out.combinations)
    known = list(concepts.values())
    drawn = splits.draw(known)
    assert drawn == splits.draw(known[::-1])
    families = {c.family for c in known}
    assert drawn.families == held_out.families & families
    assert drawn.combinations == held_out.combinations & {c.combination for c in known}
    assert drawn.families and drawn.combinations  # the fixture must exercise both


def test_lists_survive_a_round_trip(concepts: dict[str, Concept], tmp_path: Path) -> None:
    drawn = splits.draw(list(concepts.values()))
    files = (tmp_path / "families.txt", tmp_path / "combinations.txt")
    splits.write(drawn, concepts.values(), *files)
    assert splits.read(*files) == drawn


SKIN = '<circle cx="8" cy="8" r="7" fill="#C68642"/><path style="fill:#8d5524" d="M4 9h8v2H4z"/>'


def colours_of(body: str) -> list[tuple[int, int, int]]:
    found = [restyle.parse_colour(c) for c in re.findall(r"#[0-9a-fA-F]{6}", body)]
    return [c for c in found if c is not None]


def test_restyling_keeps_skin_tones(concepts: dict[str, Concept]) -> None:
    concept = concepts["1f44f-1f3fe"]
    assert restyle.colour_matters(concept)
    icon = Icon("hand", SKIN, 0, 0, 16, 16)
    changed = False
    for seed in range(40):
        body, grey = restyle.restyle_body(
            icon, exact_colour=True, people=True, rng=random.Random(seed)
        )
        assert not grey
        fills = colours_of(" ".join(re.findall(r'fill(?:="|:)#[0-9a-f]{6}', body)))
        assert len(fills) in (2, 4)  # four where a stroked copy lies below
        for original, now in zip([(0xC6, 0x86, 0x42), (0x8D, 0x55, 0x24)] * 2, fills, strict=False):
            # A neighbouring skin tone is some 40 levels away.
            assert max(abs(a - b) for a, b in zip(original, now, strict=True)) <= 16
            changed |= original != now
    assert changed


def test_colour_matters_where_colour_is_the_meaning(concepts: dict[str, Concept]) -> None:
    by_label = {c.label: c for c in concepts.values()}
    for label in ("red heart", "flag: Wales", "black bird", "woman: red hair"):
        assert restyle.colour_matters(by_label[label]), label
    for label in ("grinning face", "bird", "technologist"):
        assert not restyle.colour_matters(by_label[label]), label


def test_jitter_moves_each_colour_once() -> None:
    body = '<path fill="#ff0000"/><path fill="#f00"/><path stroke="none" fill="#0000ff"/>'
    out = restyle.jitter_colours(body, random.Random(3), restyle.NORMAL)
    first, second, third = re.findall(r'fill="(#[0-9a-f]{6})"', out)
    assert first == second != "#ff0000"
    assert 'stroke="none"' in out
    hue = colorsys.rgb_to_hls(*(c / 255 for c in restyle.parse_colour(third) or ()))[0]
    assert abs(hue - 2 / 3) <= restyle.NORMAL.shift + restyle.NORMAL.hue + 0.01


def test_gradients_become_one_of_their_stops() -> None:
    body = (
        '<defs><linearGradient id="a"><stop stop-color="#112233"/><stop offset="1" '
        'stop-color="#445566"/></linearGradient><radialGradient id="b" href="#a"/></defs>'
        '<path fill="url(#a)"/><path fill="url(#b)"/><path fill="url(#unknown)"/>'
    )
    out = restyle.flatten_gradients(body, random.Random(0))
    first, second, third = re.findall(r'<path fill="([^"]+)"', out)
    assert {first, second} <= {"#112233", "#445566"}
    assert third == "url(#unknown)"


def test_outlines() -> None:
    icon = Icon("square", CANVAS + SQUARE.format(0xFFFFFF), 0, 0, 16, 16)
    assert ink(render(icon, icon.body)) == 0.0
    outlined = render(icon, restyle.outline_shapes(icon.body, icon, "#000000", 0.05))
    assert 0.02 < ink(outlined) < 0.4
    assert outlined[4, 4].tolist() == [255, 255, 255]  # the canvas got no frame
    stroked = '<path fill="none" stroke="#000" d="M2 2h12v9H2z"/><path stroke="#000" d="M2 2h3"/>'
    assert restyle.remove_outlines(stroked).count("stroke=") == 1


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real build of the fixture concepts in three styles, without packages."""
    known = make_concepts()
    body = {c.key: SQUARE.format(0x331100 + 97 * i) for i, c in enumerate(known)}
    icons = {k: Icon(k, CANVAS + b, 0, 0, 16, 16) for k, b in body.items()}
    styles = ("noto", "emojione", packages.HELDOUT_STYLE)
    sources = emoji.Sources(known, {s: icons if s in styles else {} for s in packages.STYLES})
    monkeypatch.setattr(emoji, "read_sources", lambda cache: sources)
    monkeypatch.setattr(splits, "read", lambda: splits.draw(known))
    emoji.build(tmp_path / "a", tmp_path, seed=0, workers=1, write_splits=False)
    return tmp_path


def test_build_and_load(built: Path) -> None:
    data = emoji.load(built / "a")
    count = len(data.concepts)
    assert data.styles == ["noto", "emojione", packages.HELDOUT_STYLE]
    assert data.images.shape == (len(data.style_ids), SIZE, SIZE, 3)
    assert np.stack(list(data.masks.values())).sum(axis=0).tolist() == [1] * len(data.images)

    fluent = data.style_ids == data.styles.index(packages.HELDOUT_STYLE)
    assert fluent.sum() == count
    assert (data.masks["heldout_style"] == fluent).all()
    assert data.heldout_concept[fluent].any() and data.heldout_combination[fluent].any()

    train = data.masks["train"]
    assert not (train & (data.heldout_concept | data.heldout_combination)).any()
    assert (data.variants[~train] == 0).all()
    seen = set(data.concept_ids[train])
    held_out = data.masks["heldout_concept"] | data.masks["heldout_combination"]
    unseen = set(data.concept_ids[held_out])
    assert seen and unseen and not seen & unseen
    assert {data.concepts[c].family for c in seen}.isdisjoint(
        {data.concepts[c].family for c in data.concept_ids[data.masks["heldout_concept"]]}
    )
    assert len(data.rows("train")) == 4 * len(data.rows("train", originals=True))

    key = "1f469-1f3ff-200d-1f4bb"
    row = int(np.flatnonzero(data.concept_ids == data.concept_index[key])[0])
    position = [c.key for c in data.concepts].index(key)
    expected = 0x331100 + 97 * position
    centre = data.images[row, SIZE // 2, SIZE // 2].tolist()
    assert centre == [expected >> 16, expected >> 8 & 255, expected & 255]


def test_pictures_shared_with_a_held_out_concept_are_not_trained_on() -> None:
    known = make_concepts()
    held_out = splits.HeldOut(frozenset({"1f600"}), frozenset())
    gradient = '<linearGradient id="{0}"/><path fill="url(#{0})" d="M0 0h9v9H0z"/>'
    bodies = {
        "1f600": gradient.format("SVGaaaaaaaa"),
        "2764": gradient.format("SVGbbbbbbbb"),
        "1f426": gradient.format("SVGcccccccc").replace("h9", "h8"),
    }
    icons = {k: Icon(k, b, 0, 0, 16, 16) for k, b in bodies.items()}
    drawn = {s: icons if s in ("noto", "fxemoji") else {} for s in packages.STYLES}
    drawn["fxemoji"] = {"2764": icons["2764"]}
    items = emoji.plan_items(emoji.Sources(known, drawn), held_out)
    assert {(i.style, i.key) for i in items} == {
        ("noto", "1f600"),
        ("noto", "1f426"),
        ("fxemoji", "2764"),  # a style that does not draw the held-out concept may keep it
    }


def test_build_is_reproducible_and_resumes(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_CHUNK", 32)
    drawn: list[int] = []
    whole = emoji._draw_chunk

    def stop_after_two(chunk: int) -> int:
        if chunk >= 2:
            raise KeyboardInterrupt
        return whole(chunk)

    out = built / "b"
    monkeypatch.setattr(emoji, "_draw_chunk", stop_after_two)
    monkeypatch.setattr(emoji.multiprocessing, "get_context", lambda _: SerialPool(drawn))
    with pytest.raises(KeyboardInterrupt):
        emoji.build(out, built, seed=0, workers=1, write_splits=False)
    with pytest.raises(FileNotFoundError, match="no finished emoji data set"):
        emoji.load(out)
    monkeypatch.setattr(emoji, "_draw_chunk", whole)
    drawn.clear()
    emoji.build(out, built, seed=0, workers=1, write_splits=False)
    assert drawn and 0 not in drawn and 1 not in drawn
    np.testing.assert_array_equal(emoji.load(out).images, emoji.load(built / "a").images)
    assert sorted(p.name for p in out.iterdir()) == [
        "concepts.jsonl", "images.npy", "items.jsonl", "manifest.json",
    ]  # fmt: skip
    drawn.clear()
    emoji.build(out, built, seed=0, workers=1, write_splits=False)
    assert drawn == []


class SerialPool:
    """Stands for a worker pool where a test must stop the build at a known chunk."""

    def __init__(self, drawn: list[int]) -> None:
        self._drawn = drawn

    def Pool(self, workers: int) -> SerialPool:  # noqa: N802 - the library's name
        return self

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def imap_unordered(self, function: Any, chunks: list[int]) -> Any:
        for chunk in chunks:
            self._drawn.append(chunk)
            yield function(chunk)


def test_build_refuses_another_hold_out(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "read", lambda: splits.HeldOut(frozenset({"0"}), frozenset()))
    with pytest.raises(ValueError, match="--write-splits"):
        emoji.build(built / "c", built, seed=0, workers=1, write_splits=False)


def test_wrong_archive_is_refused(tmp_path: Path) -> None:
    package = packages.STYLES["noto"]
    assert package.archive_name == f"iconify-json-noto-{package.version}.tgz"
    (tmp_path / package.archive_name).write_bytes(b"something else")
    with pytest.raises(packages.PackageError, match="SHA-256"):
        packages.fetch(package, tmp_path)
