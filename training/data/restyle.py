"""Plausible other art styles of one SVG drawing: recoloured, outlined, flat, line art, grey.

A model trained on a few icon sets learns their palettes and line widths. Varying these, per image
and with a fixed seed, makes it look at shapes instead. Where colour is what an emoji means (skin
tones, hearts, flags, ...) colours move only within `MILD`.
"""

from __future__ import annotations

import colorsys
import random
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.concepts import Concept
from training.data.icons import Icon
from training.data.render import RenderError, ink, render

Rgb = tuple[int, int, int]

_PAINT = re.compile(r'\b(fill|stroke|stop-color)(="|:\s*)(#[0-9a-fA-F]{3,8}|[a-zA-Z]+)')
_GRADIENT = re.compile(r"<(linearGradient|radialGradient)\b([^>]*?)(?:/>|>(.*?)</\1>)", re.DOTALL)
_URL = re.compile(r'\bfill="url\(#([^)]+)\)"')
_CLOSED_STROKED = re.compile(r"<(path|circle|ellipse|rect|polygon)\b[^>]*?/?>")
_STROKE = re.compile(r'\sstroke="(?!none)[^"]*"')
_STROKE_WIDTH = re.compile(r'stroke-width="([\d.]+)"')

_NAMED: dict[str, Rgb] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 165, 0),
    "gold": (255, 215, 0),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "tan": (210, 180, 140),
    "tomato": (255, 99, 71),
    "currentColor": (0, 0, 0),
}

_COLOUR_WORDS = frozenset(
    "red orange yellow green blue purple brown black white pink grey gray gold silver bronze "
    "light blond rainbow traffic medal color colour blood fire apple".split()
)
_COLOUR_SUBGROUPS = frozenset({"heart", "geometric", "flag", "country-flag", "subdivision-flag"})


@dataclass(frozen=True)
class Jitter:
    """Half-ranges of the colour changes: `hue` in turns, `saturation` and `lightness` in 0..1.

    `shift` bounds the hue change shared by all colours of an image.
    """

    shift: float
    hue: float
    saturation: float
    lightness: float


MILD = Jitter(shift=0.005, hue=0.006, saturation=0.05, lightness=0.02)
NORMAL = Jitter(shift=0.05, hue=0.035, saturation=0.25, lightness=0.10)
STRONG = Jitter(shift=0.5, hue=0.06, saturation=0.3, lightness=0.12)


def colour_matters(concept: Concept) -> bool:
    """Whether another colour would make the image show something else."""
    if concept.tones or concept.hair != "none" or concept.group in ("flags", "component"):
        return True
    words = set(re.split(r"[^a-z]+", concept.label.lower()))
    return concept.subgroup in _COLOUR_SUBGROUPS or bool(words & _COLOUR_WORDS)


def parse_colour(text: str) -> Rgb | None:
    """RGB of `#rgb`, `#rrggbb` (an alpha is ignored) or a known name; None for anything else."""
    if not text.startswith("#"):
        return _NAMED.get(text)
    digits = text[1:]
    if len(digits) in (3, 4):
        digits = "".join(d * 2 for d in digits)
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _luminance(colour: Rgb) -> float:
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def jitter_colours(body: str, rng: random.Random, jitter: Jitter) -> str:
    """Moves every distinct colour of `body` by its own random step, plus one shared hue step."""
    shift = rng.uniform(-jitter.shift, jitter.shift)
    moved: dict[Rgb, str] = {}

    def move(colour: Rgb) -> str:
        hue, light, saturation = colorsys.rgb_to_hls(*(c / 255 for c in colour))
        hue = (hue + shift + rng.uniform(-jitter.hue, jitter.hue)) % 1.0
        saturation *= 1 + rng.uniform(-jitter.saturation, jitter.saturation)
        light += rng.uniform(-jitter.lightness, jitter.lightness)
        red, green, blue = colorsys.hls_to_rgb(
            hue, min(max(light, 0.0), 1.0), min(max(saturation, 0.0), 1.0)
        )
        return _hex((round(red * 255), round(green * 255), round(blue * 255)))

    def replace(match: re.Match[str]) -> str:
        colour = parse_colour(match[3])
        if colour is None:
            return match[0]
        if colour not in moved:
            moved[colour] = move(colour)
        return f"{match[1]}{match[2]}{moved[colour]}"

    return _PAINT.sub(replace, body)


def flatten_gradients(body: str, rng: random.Random) -> str:
    """Replaces each gradient fill by one of the gradient's own stop colours."""
    stops: dict[str, list[str]] = {}
    parents: dict[str, str] = {}
    for match in _GRADIENT.finditer(body):
        name = re.search(r'\bid="([^"]+)"', match[2])
        if name is None:
            continue
        parent = re.search(r'href="#([^"]+)"', match[2])
        if parent is not None:
            parents[name[1]] = parent[1]
        stops[name[1]] = re.findall(r'stop-color="(#[0-9a-fA-F]{3,8})"', match[3] or "")

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        colours = stops.get(name) or stops.get(parents.get(name, ""))
        return f'fill="{rng.choice(colours)}"' if colours else match[0]

    return _URL.sub(replace, body)


def outline_shapes(body: str, icon: Icon, colour: str, width: float) -> str:
    """Strokes every shape; `width` is a share of the icon's longest side."""
    stroke = width * max(icon.width, icon.height)
    body = _drop_invisible(body)
    return f'<g stroke="{colour}" stroke-width="{stroke:.3g}" stroke-linejoin="round">{body}</g>'


def outline_silhouette(body: str, icon: Icon, colour: str, width: float) -> str:
    """Draws a thick stroked copy below the drawing, which leaves a line around it only."""
    return outline_shapes(body, icon, colour, 2 * width) + body


def _drop_invisible(body: str) -> str:
    # Icon sets mark their canvas with an unpainted rectangle, which an inherited stroke would show.
    return re.sub(r'<(?:path|rect)\b(?=[^>]*fill="none")(?![^>]*stroke=)[^>]*/>', "", body)


def remove_outlines(body: str) -> str:
    """Takes the stroke off closed shapes and keeps open lines, which draw mouths, strings, ..."""

    def strip(match: re.Match[str]) -> str:
        element = match[0]
        if match[1] == "path" and not re.search(r'\bd="[^"]*[zZ]\s*"', element):
            return element
        return _STROKE.sub("", element)

    return _CLOSED_STROKED.sub(strip, body)


def scale_strokes(body: str, factor: float, colour: str) -> str:
    """Changes the width of existing strokes and gives black ones `colour`."""
    body = _STROKE_WIDTH.sub(lambda m: f'stroke-width="{float(m[1]) * factor:.3g}"', body)
    return re.sub(r'\bstroke="(#000|#000000|black)"', f'stroke="{colour}"', body)


def line_art(body: str, icon: Icon, colour: str, width: float, rng: random.Random) -> str:
    """White shapes with dark lines; what was dark stays filled, so that eyes and text survive."""
    body = flatten_gradients(body, rng)

    def replace(match: re.Match[str]) -> str:
        parsed = parse_colour(match[3])
        if parsed is None or match[1] == "stop-color":
            return match[0]
        dark = match[1] == "stroke" or _luminance(parsed) < 0.3
        return f"{match[1]}{match[2]}{colour if dark else '#ffffff'}"

    return outline_shapes(_PAINT.sub(replace, body), icon, colour, width)


def _dark(rng: random.Random) -> str:
    red, green, blue = colorsys.hls_to_rgb(
        rng.random(), rng.uniform(0.02, 0.22), rng.uniform(0.0, 0.6)
    )
    return _hex((round(red * 255), round(green * 255), round(blue * 255)))


def _pale(rng: random.Random) -> str:
    red, green, blue = colorsys.hls_to_rgb(rng.random(), rng.uniform(0.86, 0.96), rng.random())
    return _hex((round(red * 255), round(green * 255), round(blue * 255)))


def restyle_body(
    icon: Icon, *, exact_colour: bool, people: bool, rng: random.Random
) -> tuple[str, bool]:
    """One random restyling: (SVG body, whether the image is to be made grey).

    `exact_colour` limits colours to MILD changes and forbids grey and line art; `people` forbids
    hue changes that could pass for a skin tone.
    """
    body = icon.body
    has_strokes = _STROKE.search(body) is not None
    single_colour = "currentColor" in body
    if not exact_colour and not single_colour and rng.random() < 0.15:
        return line_art(body, icon, _dark(rng), rng.uniform(0.010, 0.026), rng), False
    if single_colour:
        red, green, blue = colorsys.hls_to_rgb(
            rng.random(), rng.uniform(0.15, 0.5), rng.uniform(0.2, 1.0)
        )
        colour = _hex((round(red * 255), round(green * 255), round(blue * 255)))
        colour = _dark(rng) if exact_colour or people else colour
        body = body.replace("currentColor", colour)
        if rng.random() < 0.4:
            body = outline_silhouette(body, icon, _dark(rng), rng.uniform(0.005, 0.015))
        return body, False

    if "Gradient" in body and rng.random() < 0.5:
        body = flatten_gradients(body, rng)
    jitter = MILD if exact_colour else NORMAL
    if jitter is NORMAL and not people and rng.random() < 0.2:
        jitter = STRONG
    if people and jitter is NORMAL:
        jitter = Jitter(shift=0.02, hue=0.02, saturation=0.2, lightness=0.05)
    body = jitter_colours(body, rng, jitter)
    if has_strokes:
        if rng.random() < 0.4:
            body = remove_outlines(body)
        else:
            body = scale_strokes(body, rng.uniform(0.4, 1.6), _dark(rng))
    else:
        choice = rng.random()
        if choice < 0.25:
            body = outline_shapes(body, icon, _dark(rng), rng.uniform(0.006, 0.018))
        elif choice < 0.5:
            body = outline_silhouette(body, icon, _dark(rng), rng.uniform(0.008, 0.022))
    grey = not exact_colour and not people and rng.random() < 0.12
    return body, grey


def restyled_image(concept: Concept, icon: Icon, seed: str) -> NDArray[np.uint8]:
    """uint8 RGB `[SIZE, SIZE, 3]`: a restyling that `seed` decides.

    A result that lost most of the drawing (or cannot be rendered) is drawn anew from the same
    stream of random numbers, at last as a plain colour change.
    """
    rng = random.Random(seed)
    exact = colour_matters(concept)
    people = concept.group in ("people-body", "smileys-emotion")
    original = ink(render(icon, icon.body))
    for _ in range(3):
        body, grey = restyle_body(icon, exact_colour=exact, people=people, rng=rng)
        background = _pale(rng) if rng.random() < 0.15 else "#ffffff"
        try:
            image = render(icon, body, background)
        except RenderError:
            continue
        if ink(image) < 0.35 * original:
            continue
        if grey:
            values = image @ np.array([0.299, 0.587, 0.114])
            image = np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=-1)
        return image
    return render(icon, jitter_colours(icon.body, rng, MILD))
