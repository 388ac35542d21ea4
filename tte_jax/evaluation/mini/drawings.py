"""One drawing a picture: classification, text to image, image to image, composed.

OpenMoji is the corpus, Twemoji another hand. The built-in models were trained on both styles: these
tasks show regressions, not generalisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tte_jax.builtin import openmoji, twemoji
from tte_jax.builtin.openmoji import Entry
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.rows import PLACEHOLDER, REPRESENT, image_row
from tte_jax.evaluation.mini.workshop import Workshop


def classification(shop: Workshop) -> None:
    """A Twemoji picture; the candidates are names."""
    entries = _both(shop)
    shop.rows(
        image_row(
            qry_inst=f"{PLACEHOLDER}\nName what the picture shows.",
            qry_img_path=_twemoji(shop, entry),
            tgt_text=[e.shown.name for e in _first(entry, entries)],
        )
        for entry in entries
    )


def text_to_image(shop: Workshop) -> None:
    """A name; the candidates are OpenMoji pictures."""
    entries = _both(shop)
    shop.rows(
        image_row(
            qry_inst="Find the picture that the text names.",
            qry_text=entry.shown.name,
            tgt_inst=REPRESENT,
            tgt_img_path=[_openmoji(shop, e) for e in _first(entry, entries)],
        )
        for entry in entries
    )


def image_to_image(shop: Workshop) -> None:
    """A Twemoji picture; the candidates are OpenMoji pictures."""
    entries = _both(shop)
    shop.rows(
        image_row(
            qry_inst=f"{PLACEHOLDER}\nFind a picture of the same thing.",
            qry_img_path=_twemoji(shop, entry),
            tgt_inst=REPRESENT,
            tgt_img_path=[_openmoji(shop, e) for e in _first(entry, entries)],
        )
        for entry in entries
    )


def composed(shop: Workshop) -> None:
    """A person and a skin tone; the candidates are all tones of all people."""
    people = concepts.people()
    shop.at_most(len(people), "people in five skin tones")
    people = people[: shop.queries]
    every = [tone for _, tones in people for tone in tones]
    rows: list[dict[str, Any]] = []
    for number, (entry, tones) in enumerate(people):
        right = tones[number % len(tones)]
        rows.append(
            image_row(
                qry_inst=f"{PLACEHOLDER}\nFind the picture with the change that is asked for.",
                qry_text=f"the same, but with {right.shown.skin} skin tone",
                qry_img_path=_openmoji(shop, entry),
                tgt_inst=REPRESENT,
                tgt_img_path=[_openmoji(shop, e) for e in _first(right, every)],
            )
        )
        shop.progress(number + 1)
    shop.rows(rows)


def _both(shop: Workshop) -> list[Entry]:
    # Counting those of one hand costs nothing; the other hand has to draw.
    shop.at_most(len(concepts.plain()), "concepts")
    entries = concepts.in_both_hands(shop.queries)
    shop.at_most(len(entries), "concepts that both hands draw")
    return entries


def _openmoji(shop: Workshop, entry: Entry) -> str:
    return shop.media(
        f"openmoji/{entry.hexcode}.png", lambda: openmoji.document(entry).content.media[0].data
    )


def _twemoji(shop: Workshop, entry: Entry) -> str:
    return shop.media(f"twemoji/{entry.hexcode}.png", lambda: twemoji.picture(entry.hexcode))


def _first(right: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """The right one first, as published."""
    return [right, *(e for e in entries if e.hexcode != right.hexcode)]
