"""Questions about pictures: four drawings in a square, and the shapes of easy-VQA."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest

from PIL import Image

from tte_jax.builtin.openmoji import Entry
from tte_jax.builtin.pictures import png
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.packages import Package, Registry
from tte_jax.evaluation.mini.rows import PLACEHOLDER, image_row
from tte_jax.evaluation.mini.workshop import Workshop

ASK = f"{PLACEHOLDER}\nAnswer the question about the picture."
CELL = 112
CORNERS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three", "four")

EASY_VQA = Package(
    "easy-vqa",
    Registry.PYPI,
    "MIT",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    megabytes=3,
)
_TEST = "easy_vqa/data/test"


def about_drawings(shop: Workshop) -> None:
    """Four drawings in a square and a question with four answers to choose from: how many, what is
    in a corner, what is beside or below, and what is not shown."""
    things = concepts.plain()
    # The kinds of question take turns; each question has things of its own.
    shop.at_most(len(things) // 4, "drawings")
    rows = []
    for number in range(shop.queries):
        four = things[4 * number : 4 * number + 4]
        absent = things[(4 * number + 4) % len(things)]
        shown, question, answers = _KINDS[number % len(_KINDS)](f"qa{number}", four, absent)
        path = shop.media(f"mini-qa/{number}.png", lambda shown=shown: png(square(shown)))
        rows.append(image_row(qry_inst=ASK, qry_text=question, qry_img_path=path, tgt_text=answers))
        shop.progress(number + 1)
    shop.rows(rows)


def square(four: Sequence[Entry]) -> Image.Image:
    """Four drawings: top left, top right, bottom left, bottom right."""
    canvas = Image.new("RGB", (2 * CELL, 2 * CELL), "white")
    for place, entry in enumerate(four):
        canvas.paste(concepts.drawn(entry, CELL - 8), (place % 2 * CELL + 4, place // 2 * CELL + 4))
    return canvas


_Question = tuple[list[Entry], str, list[str]]
"""What is shown, the question, and the answers with the right one first."""


def _count(seed: str, four: list[Entry], _: Entry) -> _Question:
    times = concepts.number(seed, 4) + 1
    shown = concepts.shuffled([four[0]] * times + four[1 : 5 - times], seed)
    answers = [COUNTS[times - 1], *(c for c in COUNTS if c != COUNTS[times - 1])]
    return shown, f"How many times is this shown: {four[0].shown.name}?", answers


def _corner(seed: str, four: list[Entry], _: Entry) -> _Question:
    place = concepts.number(seed, 4)
    return four, f"What is in the {CORNERS[place]} corner?", _names(four, place)


# The place that is named, the one that is asked for, and how the second lies to the first.
_BESIDE = (
    (0, 1, "to the right of"),
    (1, 0, "to the left of"),
    (2, 3, "to the right of"),
    (3, 2, "to the left of"),
    (0, 2, "below"),
    (1, 3, "below"),
    (2, 0, "above"),
    (3, 1, "above"),
)


def _neighbour(seed: str, four: list[Entry], _: Entry) -> _Question:
    named, asked, how = _BESIDE[concepts.number(seed, len(_BESIDE))]
    return four, f"What is {how} this: {four[named].shown.name}?", _names(four, asked)


def _absent(seed: str, four: list[Entry], absent: Entry) -> _Question:
    left_out = concepts.number(seed, 4)
    options = [absent, *(e for place, e in enumerate(four) if place != left_out)]
    return four, "Which of these is not shown?", _names(options, 0)


_KINDS = (_count, _corner, _neighbour, _absent)


def _names(entries: Sequence[Entry], right: int) -> list[str]:
    names = [e.shown.name for e in entries]
    return [names[right], *(n for place, n in enumerate(names) if place != right)]


def about_shapes(shop: Workshop) -> None:
    """easy-VQA's test split: a shape and a question; the candidates are its 13 answers.

    The answers take turns, since most of the split's questions are answered by yes or no.
    """
    archive = shop.packages[EASY_VQA.name]
    asked = json.loads(archive.file(f"{_TEST}/questions.json"))
    answers = archive.file("easy_vqa/data/answers.txt").decode().split()
    by_answer: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for question, answer, image in asked:
        by_answer[answer].append((question, answer, image))
    drawn = [
        concepts.by_hash(by_answer[answer], lambda row: f"{row[2]} {row[0]}") for answer in answers
    ]
    turns = [row for row in chain.from_iterable(zip_longest(*drawn)) if row is not None]
    shop.at_most(len(turns), "questions")
    turns = turns[: shop.queries]
    wanted = {f"{_TEST}/images/{image}.png" for _, _, image in turns}
    pictures = dict(archive.files(wanted.__contains__))
    rows = []
    for question, answer, image in turns:
        data = pictures[f"{_TEST}/images/{image}.png"]
        rows.append(
            image_row(
                qry_inst=ASK,
                qry_text=question,
                qry_img_path=shop.media(f"easy-vqa/{image}.png", lambda data=data: data),
                tgt_text=[answer, *(a for a in answers if a != answer)],
            )
        )
    shop.rows(rows)
