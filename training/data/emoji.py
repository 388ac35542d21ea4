"""The emoji data set: thousands of concepts, each drawn by up to eight artists.

    python -m training.data.emoji --out .data/emoji

fetches pinned npm packages, joins icons to emojibase's concepts, renders every icon at 112 x 112
pixels and writes, under `--out`:

* `images.npy`       uint8 `[N, 112, 112, 3]`, to be memory-mapped
* `items.jsonl`      one row per image: row, style, key, variant, split, the two hold-out flags
* `concepts.jsonl`   one row per concept: texts and attributes
* `manifest.json`    packages with SHA-256 and licence, counts, seed; written last

A build that was cut short continues where it stopped; a finished one is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data import splits
from training.data.concepts import Concept, build_concepts
from training.data.icons import Icon, build_name_index, match_icons
from training.data.packages import EMOJIBASE, STYLES, fetch, read_json
from training.data.render import SIZE, render
from training.data.restyle import restyled_image

SEED = 0
RESTYLES = 3
_CHUNK = 512
_FORMAT = 1  # raise it when the same inputs would give other images
_SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")
# The sets whose own names and code points teach us what the names in the other sets mean.
_NAMING_STYLES = ("noto", "twemoji", "openmoji")
# Drawings that do not show their emoji: the sets that match by name are older than the insect and
# call the sport's bat and ball "cricket".
_WRONG = {
    ("noto-v1", "1f997"),
    ("emojione", "1f997"),
    ("emojione-monotone", "1f997"),
}
# Without colour dozens of flags are one picture.
_NO_FLAGS = "emojione-monotone"


@dataclass(frozen=True)
class Item:
    """One image: `variant` 0 is the original drawing, 1.. are restyled ones."""

    row: int
    style: str
    key: str
    variant: int
    split: str
    heldout_concept: bool
    heldout_combination: bool


@dataclass(frozen=True)
class Sources:
    """Everything read from the packages: concepts, and per style the matched icons by key."""

    concepts: list[Concept]
    icons: dict[str, dict[str, Icon]]


def read_sources(cache: Path) -> Sources:
    """Fetches and parses all packages, and matches icons to concepts."""
    members = [f"en/shortcodes/{preset}.json" for preset in _SHORTCODES]
    data, groups, names, *presets = read_json(
        fetch(EMOJIBASE, cache),
        "en/data.json",
        "meta/groups.json",
        "meta/unicode-names.json",
        *members,
    )
    concepts = build_concepts(data, groups, presets)
    sets = {
        style: read_json(fetch(package, cache), "icons.json", "chars.json")
        for style, package in STYLES.items()
    }
    index = build_name_index(concepts, names, [(sets[s][0], sets[s][1]) for s in _NAMING_STYLES])
    flags = {c.key for c in concepts if c.group == "flags"}
    icons = {
        style: {
            key: icon
            for key, icon in match_icons(concepts, body, chars, index).items()
            if (style, key) not in _WRONG and not (style == _NO_FLAGS and key in flags)
        }
        for style, (body, chars) in sets.items()
    }
    return Sources(concepts, icons)


def plan_items(sources: Sources, held_out: splits.HeldOut) -> list[Item]:
    """All images to draw, in row order: originals everywhere, restyled ones for training only.

    A concept to train on is left out of a style that draws it exactly like a held-out one (some
    artists draw man and person alike): its picture would show the held-out picture.
    """
    items: list[Item] = []
    for style in STYLES:
        icons = sources.icons[style]
        concepts = [c for c in sources.concepts if c.key in icons]
        unseen = {
            icons[c.key].drawing
            for c in concepts
            if held_out.split(c, style) in (splits.HELDOUT_CONCEPT, splits.HELDOUT_COMBINATION)
        }
        for concept in concepts:
            split = held_out.split(concept, style)
            if split == splits.TRAIN and icons[concept.key].drawing in unseen:
                continue
            for variant in range(1 + RESTYLES if split == splits.TRAIN else 1):
                items.append(
                    Item(
                        row=len(items),
                        style=style,
                        key=concept.key,
                        variant=variant,
                        split=split,
                        heldout_concept=held_out.concept(concept),
                        heldout_combination=held_out.combination(concept),
                    )
                )
    return items


def draw_item(item: Item, concept: Concept, icon: Icon, seed: int) -> NDArray[np.uint8]:
    """uint8 RGB `[112, 112, 3]` of one item."""
    if item.variant == 0:
        # Single-colour sets use `currentColor`, which the renderer takes for black.
        return render(icon, icon.body)
    return restyled_image(concept, icon, f"{seed}|{item.style}|{item.key}|{item.variant}")


# What the forked render workers share; set once, before the pool starts.
_job: tuple[Sources, dict[str, Concept], list[Item], Path, int] | None = None


def _draw_chunk(chunk: int) -> int:
    assert _job is not None
    sources, by_key, items, path, seed = _job
    images = np.load(path, mmap_mode="r+")
    for item in items[chunk * _CHUNK : (chunk + 1) * _CHUNK]:
        icon = sources.icons[item.style][item.key]
        images[item.row] = draw_item(item, by_key[item.key], icon, seed)
    images.flush()
    return chunk


def _draw_all(sources: Sources, items: list[Item], part: Path, seed: int, workers: int) -> None:
    global _job
    progress = part.with_suffix(".done")
    if not part.exists() or not progress.exists():
        shape = (len(items), SIZE, SIZE, 3)
        np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape).flush()
        progress.write_text("")
    done = {int(line) for line in progress.read_text().split()}
    todo = [c for c in range(-(-len(items) // _CHUNK)) if c not in done]
    _job = (sources, {c.key: c for c in sources.concepts}, items, part, seed)
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for finished, chunk in enumerate(pool.imap_unordered(_draw_chunk, todo), start=1):
                with progress.open("a") as stream:
                    stream.write(f"{chunk}\n")
                if finished % 20 == 0 or finished == len(todo):
                    print(f"drawn {finished} of {len(todo)} chunks", flush=True)
    finally:
        _job = None


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _fingerprint(items: list[Item], seed: int) -> str:
    text = json.dumps(
        [_FORMAT, seed, RESTYLES, SIZE]
        + [p.sha256 for p in (EMOJIBASE, *STYLES.values())]
        + [list(vars(item).values()) for item in items]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _counts(items: list[Item]) -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for item in items:
        row = counts.setdefault(item.style, {}).setdefault(
            item.split, {"originals": 0, "restyled": 0}
        )
        row["originals" if item.variant == 0 else "restyled"] += 1
    return counts


def build(out: Path, cache: Path, *, seed: int, workers: int, write_splits: bool) -> None:
    """Builds the data set at `out`; see the module docstring for the files.

    Raises ValueError when the concepts draw other hold-outs than the committed ones (and
    `write_splits` is false), PackageError when a package cannot be had.
    """
    sources = read_sources(cache)
    for style, icons in sources.icons.items():
        print(f"{style}: {len(icons)} of {len(sources.concepts)} concepts")
    drawn = splits.draw(sources.concepts)
    if write_splits:
        splits.write(drawn, sources.concepts)
    held_out = splits.read()
    if held_out != drawn:
        raise ValueError(
            f"{splits.FAMILIES_FILE.name} and {splits.COMBINATIONS_FILE.name} are not what these "
            "concepts draw; restore them, or pass --write-splits to move the hold-out on purpose"
        )
    items = plan_items(sources, held_out)
    fingerprint = _fingerprint(items, seed)
    manifest_path = out / "manifest.json"
    if manifest_path.exists():
        if json.loads(manifest_path.read_text())["fingerprint"] == fingerprint:
            print(f"{out} is complete already")
            return
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"images.{fingerprint[:12]}.npy"
    _draw_all(sources, items, part, seed, workers)
    manifest_path.unlink(missing_ok=True)  # an older data set is whole until its files go
    os.replace(part, out / "images.npy")
    part.with_suffix(".done").unlink()
    _write_lines(out / "items.jsonl", [vars(item) for item in items])
    _write_lines(out / "concepts.jsonl", [c.to_json() for c in sources.concepts])
    manifest = {
        "fingerprint": fingerprint,
        "seed": seed,
        "restyles": RESTYLES,
        "image_shape": [len(items), SIZE, SIZE, 3],
        "concepts": len(sources.concepts),
        "matched": {style: len(icons) for style, icons in sources.icons.items()},
        "counts": _counts(items),
        "packages": {
            p.name: {"version": p.version, "sha256": p.sha256, "licence": p.licence}
            for p in (EMOJIBASE, *STYLES.values())
        },
    }
    temporary = manifest_path.with_name("manifest.json.partial")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, manifest_path)


@dataclass(frozen=True, kw_only=True)
class EmojiData:
    """A built data set. `N` images, `C` concepts, styles in the order of `styles`.

    images: uint8 `[N, 112, 112, 3]`, memory-mapped read-only.
    concepts: the `C` concepts; `concept_index` maps a key to its position.
    style_ids: int32 `[N]`, into `styles`.  concept_ids: int32 `[N]`, into `concepts`.
    variants: int32 `[N]`, 0 for originals.
    masks: split name -> bool `[N]`; the four masks are disjoint and cover all images.
    heldout_concept, heldout_combination: bool `[N]`, also set within the held-out style.
    manifest: the parsed `manifest.json`.
    """

    images: NDArray[np.uint8]
    styles: list[str]
    concepts: list[Concept]
    concept_index: dict[str, int]
    style_ids: NDArray[np.int32]
    concept_ids: NDArray[np.int32]
    variants: NDArray[np.int32]
    masks: dict[str, NDArray[np.bool_]]
    heldout_concept: NDArray[np.bool_]
    heldout_combination: NDArray[np.bool_]
    manifest: dict[str, Any]

    def rows(self, split: str, *, originals: bool = False) -> NDArray[np.int64]:
        """Image rows of a split, ascending; with `originals`, without the restyled ones."""
        mask = self.masks[split]
        return np.flatnonzero(mask & (self.variants == 0) if originals else mask)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def load(path: str | Path) -> EmojiData:
    """Opens a data set that `build` wrote.

    Raises FileNotFoundError when the folder holds no finished data set, ValueError when images and
    items disagree in number.
    """
    root = Path(path)
    if not (root / "manifest.json").exists():
        raise FileNotFoundError(
            f"{root} holds no finished emoji data set; run "
            f"`python -m training.data.emoji --out {root}`"
        )
    images = np.load(root / "images.npy", mmap_mode="r")
    concepts = [Concept.from_json(row) for row in _read_lines(root / "concepts.jsonl")]
    items = [Item(**row) for row in _read_lines(root / "items.jsonl")]
    if len(items) != len(images):
        raise ValueError(
            f"{root}: {len(images)} images but {len(items)} items; delete manifest.json and build "
            "again"
        )
    manifest = json.loads((root / "manifest.json").read_text())
    styles = list(manifest["counts"])
    style_index = {style: i for i, style in enumerate(styles)}
    concept_index = {c.key: i for i, c in enumerate(concepts)}
    split_names = np.array([item.split for item in items])
    return EmojiData(
        images=images,
        styles=styles,
        concepts=concepts,
        concept_index=concept_index,
        style_ids=np.array([style_index[i.style] for i in items], np.int32),
        concept_ids=np.array([concept_index[i.key] for i in items], np.int32),
        variants=np.array([i.variant for i in items], np.int32),
        masks={split: split_names == split for split in splits.SPLITS},
        heldout_concept=np.array([i.heldout_concept for i in items], np.bool_),
        heldout_combination=np.array([i.heldout_combination for i in items], np.bool_),
        manifest=manifest,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.emoji", description="Builds the emoji data set."
    )
    parser.add_argument("--out", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--cache", type=Path, default=None, help="archives; default OUT/../npm")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write-splits", action="store_true", help="write the hold-out lists anew")
    options = parser.parse_args(arguments)
    build(
        options.out,
        options.cache or options.out.parent / "npm",
        seed=options.seed,
        workers=options.workers,
        write_splits=options.write_splits,
    )
    manifest = json.loads((options.out / "manifest.json").read_text())
    totals: Counter[str] = Counter()
    for style, by_split in manifest["counts"].items():
        for split, row in by_split.items():
            totals[split] += sum(row.values())
            print(f"{style:18} {split:20} {row['originals']:6} originals {row['restyled']:6} more")
    print(dict(totals))


if __name__ == "__main__":
    main()
