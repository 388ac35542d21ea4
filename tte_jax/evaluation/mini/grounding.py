"""Grounding: which part of a picture is meant. The candidates are the parts, cut out.

- drawings at odd places and sizes of one canvas, and the name of one;
- KGeography's maps, and the name of a region with its capital: names are not written on the maps.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as xml
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tte_jax.builtin.pictures import png
from tte_jax.errors import DataLossError
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.packages import Package, Registry
from tte_jax.evaluation.mini.rows import PLACEHOLDER, image_row
from tte_jax.evaluation.mini.workshop import Workshop

FIND = f"{PLACEHOLDER}\nFind the part of the picture that the text names."
PART = f"{PLACEHOLDER}\nRepresent this part of a picture."
THINGS = 6
CELL, SMALLEST = 112, 56

KGEOGRAPHY = Package("kgeography-data", Registry.DEBIAN, "GPL-2+", megabytes=11)
_MAPS = "usr/share/kgeography/"
REGIONS = 8
# A region that is to be recognised has some extent; narrower ones are islands and cities.
LEAST_SIDE = 24
MARGIN = 8

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; right and bottom are outside."""


def among_drawings(shop: Workshop) -> None:
    """Six drawings on one canvas, and the name of one."""
    things = concepts.plain()
    shop.at_most(len(things) // THINGS, "drawings")
    rows = []
    for number in range(shop.queries):
        # From the end: the other tasks begin with the first of them.
        some = things[len(things) - THINGS * (number + 1) :][:THINGS]
        canvas = Image.new("RGB", (3 * CELL, 2 * CELL), "white")
        boxes: list[Box] = []
        for place, entry in enumerate(some):
            seed = f"grounding{number} {place}"
            side = SMALLEST + concepts.number(f"{seed} side", CELL - SMALLEST)
            left = place % 3 * CELL + concepts.number(f"{seed} x", CELL - side)
            top = place // 3 * CELL + concepts.number(f"{seed} y", CELL - side)
            canvas.paste(concepts.drawn(entry, side), (left, top))
            boxes.append((left, top, left + side, top + side))
        right = concepts.number(f"grounding{number}", THINGS)
        rows.append(
            _row(shop, f"mini-grounding/{number}", canvas, boxes, right, some[right].shown.name)
        )
        shop.progress(number + 1)
    shop.rows(rows)


def _row(
    shop: Workshop, name: str, picture: Image.Image, boxes: list[Box], right: int, text: str
) -> dict[str, object]:
    """The right part first, as published."""
    order = [right, *(n for n in range(len(boxes)) if n != right)]
    return image_row(
        qry_inst=FIND,
        qry_text=text,
        qry_img_path=shop.media(f"{name}/whole.png", lambda: png(picture)),
        tgt_inst=PART,
        tgt_img_path=[
            shop.media(f"{name}/{n}.png", lambda n=n: png(picture.crop(boxes[n]))) for n in order
        ],
    )


# --- maps ---


@dataclass(frozen=True)
class Region:
    """A region of a map, by the colour that it alone has there."""

    name: str
    capital: str
    box: Box


def on_maps(shop: Workshop) -> None:
    """A map and a region's name; the candidates are some regions of that map, cut out."""
    archive = shop.packages[KGEOGRAPHY.name]
    files = dict(archive.files(lambda n: n.startswith(_MAPS) and n.endswith((".kgm", ".png"))))
    named = concepts.by_hash((n for n in files if n.endswith(".kgm")), str)
    rows = []
    # One question a map in each round, until there are enough.
    kept: dict[str, list[Region]] = {}
    turn = 0
    while len(rows) < shop.queries:
        before = len(rows)
        for name in named:
            if len(rows) == shop.queries:
                break
            if name not in kept:
                kept[name] = regions(files, name)[:REGIONS]
            some = kept[name]
            if len(some) < 4 or turn >= len(some):
                continue
            picture = _map(files, name)
            wanted = some[turn]
            text = wanted.name + (f", capital {wanted.capital}" if wanted.capital else "")
            place = f"mini-maps/{name.removeprefix(_MAPS).removesuffix('.kgm')}"
            boxes = [_wider(region.box, picture) for region in some]
            rows.append(_row(shop, place, picture, boxes, turn, text))
            shop.progress(len(rows))
        turn += 1
        if len(rows) == before:
            shop.at_most(len(rows), "regions")
    shop.rows(rows)


def regions(files: dict[str, bytes], name: str) -> list[Region]:
    """The regions of a map that are large enough, by hash of their names.

    Raises DataLossError when the map cannot be read.
    """
    pixels = np.asarray(_map(files, name), np.int32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    found: dict[str, Region] = {}
    for division in xml.fromstring(files[name]).iter("division"):
        title = (division.findtext("name") or "").strip()
        if division.findtext("ignore") in ("yes", "allowClickMode") or not title:
            continue
        red, green, blue = (int(division.findtext(f"color/{c}") or 0) for c in _COLOURS)
        rows, columns = np.nonzero(codes == (red << 16 | green << 8 | blue))
        if not len(rows):
            continue
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        if min(box[2] - box[0], box[3] - box[1]) >= LEAST_SIDE:
            capital = (division.findtext("capital") or "").strip()
            found.setdefault(title, Region(title, capital, box))
    return concepts.by_hash(found.values(), lambda region: region.name)


_COLOURS = ("red", "green", "blue")


def _map(files: dict[str, bytes], name: str) -> Image.Image:
    drawing = xml.fromstring(files[name]).findtext("mapFile") or ""
    try:
        with Image.open(io.BytesIO(files[_MAPS + drawing])) as file:
            return file.convert("RGB")
    except (KeyError, OSError) as error:
        raise DataLossError(
            f"The map {name} of {KGEOGRAPHY.name} cannot be read ({error!r}). Delete the package's "
            "file; it is downloaded again.",
            reason="UNREADABLE_DATA",
        ) from error


def _wider(box: Box, picture: Image.Image) -> Box:
    left, top, right, bottom = box
    return (
        max(0, left - MARGIN),
        max(0, top - MARGIN),
        min(picture.width, right + MARGIN),
        min(picture.height, bottom + MARGIN),
    )
