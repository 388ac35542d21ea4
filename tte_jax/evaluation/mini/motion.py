"""Drawings that move, as folders of frames.

Motions come in pairs of which one is the other backwards: the same frames, in another order. What
tells them apart is the order alone; a model that looks at one frame, or at all without their
order, is at chance between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from tte_jax.builtin.openmoji import Entry
from tte_jax.evaluation.mini import concepts
from tte_jax.evaluation.mini.workshop import Workshop

SIZE = 112
THING = 64
FRAMES = 8
FILM_THINGS = 5
FILM_FRAMES = 4  # of each thing
OPTIONS = 5


# --- the motions ---


def _moved(thing: Image.Image, part: float, dx: int, dy: int) -> Image.Image:
    """From one edge to the other; `dx`, `dy` in -1, 0, 1."""
    canvas, free = Image.new("RGB", (SIZE, SIZE), "white"), SIZE - THING
    at = [round(free / 2 + step * (part - 0.5) * free) for step in (dx, dy)]
    canvas.paste(thing, (at[0], at[1]))
    return canvas


def _grown(thing: Image.Image, part: float) -> Image.Image:
    side = round(20 + part * (SIZE - 28))
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    small = thing.resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(small, ((SIZE - side) // 2, (SIZE - side) // 2))
    return canvas


def _turned(thing: Image.Image, part: float) -> Image.Image:
    # A whole turn would end where it began.
    turned = thing.rotate(-315 * part, Image.Resampling.BICUBIC, fillcolor="white")
    return _moved(turned, 0.5, 0, 0)


def _shown(thing: Image.Image, part: float) -> Image.Image:
    canvas = _moved(thing, 0.5, 0, 0)
    return Image.blend(Image.new("RGB", canvas.size, "white"), canvas, 0.1 + 0.9 * part)


# A motion, the same backwards, and its picture after a part of the time.
_PAIRS: tuple[tuple[str, str, Callable[[Image.Image, float], Image.Image]], ...] = (
    ("moving right", "moving left", partial(_moved, dx=1, dy=0)),
    ("moving down", "moving up", partial(_moved, dx=0, dy=1)),
    ("growing", "shrinking", _grown),
    ("turning clockwise", "turning counterclockwise", _turned),
    ("appearing", "fading away", _shown),
)
MOTIONS = tuple(word for pair in _PAIRS for word in pair[:2])


@dataclass(frozen=True)
class Clip:
    """A thing and what it does."""

    entry: Entry
    motion: str

    @property
    def name(self) -> str:
        return f"{self.entry.hexcode}-{self.motion.replace(' ', '-')}"

    @property
    def caption(self) -> str:
        return f"{self.entry.shown.name}, {self.motion}"

    @property
    def backwards(self) -> Clip:
        pair = MOTIONS.index(self.motion) ^ 1
        return Clip(self.entry, MOTIONS[pair])

    def frames(self, count: int) -> list[Image.Image]:
        """112 × 112, RGB."""
        forwards, _, draw = _PAIRS[MOTIONS.index(self.motion) // 2]
        thing = concepts.drawn(self.entry, THING)
        images = [draw(thing, i / (count - 1)) for i in range(count)]
        return images if self.motion == forwards else images[::-1]


# --- one thing a clip ---


def clips(shop: Workshop) -> list[Clip]:
    """As many as there are queries: every thing with a motion and with the same backwards."""
    things = concepts.plain()
    shop.at_most(2 * len(things), "drawings")
    made = []
    for number in range(shop.queries):
        motion = MOTIONS[number % len(MOTIONS)]
        made.append(Clip(things[number // 2], motion))
        shop.frames(made[-1].name, made[-1].frames(FRAMES))
        shop.progress(number + 1)
    return made


def classification(shop: Workshop) -> None:
    """A clip; the candidates are the motions."""
    shop.rows({"video_id": clip.name, "pos_text": clip.motion} for clip in clips(shop))


def text_to_video(shop: Workshop) -> None:
    """A caption; the candidates are all clips, the same thing backwards among them."""
    shop.rows({"video_id": clip.name, "caption": [clip.caption]} for clip in clips(shop))


def video_to_text(shop: Workshop) -> None:
    """A clip; the candidates are its caption, that of the clip backwards, and three others'."""
    made = clips(shop)
    rows = []
    for number, clip in enumerate(made):
        others = [made[(number + step) % len(made)] for step in range(2, 2 * len(made), 2)]
        options = dict.fromkeys(c.caption for c in (clip, clip.backwards, *others))
        options = concepts.shuffled(list(options)[:OPTIONS], f"v2t{number}")
        rows.append({"video_id": clip.name, "pos_text": clip.caption, "neg_text": options})
    shop.rows(rows)


# --- several things one after the other ---


def _films(shop: Workshop) -> list[list[Clip]]:
    """Of each film its five clips, in order; the folders of all are written."""
    things = concepts.plain()
    shop.at_most(len(things) // FILM_THINGS, "drawings")
    films = []
    for number in range(shop.queries):
        some = things[FILM_THINGS * number :][:FILM_THINGS]
        film = [
            Clip(entry, MOTIONS[concepts.number(f"film{number} {place}", len(MOTIONS))])
            for place, entry in enumerate(some)
        ]
        whole: list[Image.Image] = []
        for place, clip in enumerate(film):
            frames = clip.frames(FILM_FRAMES)
            kind = "positive" if place == _wanted(number) else "negative"
            shop.frames(f"{number}/{kind}_{place}", frames)
            whole += frames
        shop.frames(f"{number}/query", whole)
        films.append(film)
        shop.progress(number + 1)
    return films


def _wanted(number: int) -> int:
    return concepts.number(f"moment{number}", FILM_THINGS)


def moments(shop: Workshop) -> None:
    """A film of five things and the name of one; the candidates are its five parts."""
    shop.rows(
        {"query": film[_wanted(number)].entry.shown.name, "video_path": f"films/{number}.mp4"}
        for number, film in enumerate(_films(shop))
    )


def questions(shop: Workshop) -> None:
    """A film and a question about its order; the candidates are the five things."""
    rows = []
    for number, film in enumerate(_films(shop)):
        names = [clip.entry.shown.name for clip in film]
        question, right = _question(number, names)
        options = concepts.shuffled(names, f"order{number}")
        row: dict[str, object] = {"video": f"{number}/query", "question": question}
        row["answer"] = options.index(names[right])
        rows.append(row | {f"a{i}": option for i, option in enumerate(options)})
    shop.rows(rows)


def _question(number: int, names: Sequence[str]) -> tuple[str, int]:
    """What is asked of a film, and the place of the answer."""
    last = len(names) - 1
    match number % 4:
        case 0:
            return "What is shown first?", 0
        case 1:
            return "What is shown last?", last
        case 2:
            place = concepts.number(f"after{number}", last)
            return f"What is shown right after this: {names[place]}?", place + 1
        case _:
            place = 1 + concepts.number(f"before{number}", last)
            return f"What is shown right before this: {names[place]}?", place - 1
