"""The benchmark's questions, drawn by a seed from names and pictures of the built-in corpus.

No two are alike, since the services cache what they made of a picture they have seen before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tte_jax.builtin import openmoji, twemoji
from tte_jax.content import Content
from tte_jax.errors import NotFoundError

TEXT, IMAGE, COMPOSED = "text", "image", "image + change"
KINDS = (TEXT, IMAGE, COMPOSED)

_SKIN = ("light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True)
class Question:
    """One query: its kind, one of `KINDS`, and what is asked."""

    kind: str
    content: Content


def draw(count: int, *, seed: int = 0) -> list[Question]:
    """`count` different questions, the kinds taking turns.

    Pictures are Twemoji's drawings of emoji that OpenMoji draws too. Raises ValueError when there
    are not so many different ones, PreconditionError without the packages.
    """
    rng = random.Random(seed)
    entries = list(openmoji.entries())
    rng.shuffle(entries)
    people = (e for e in entries if e.shown.gender != "none" and "+" not in e.shown.skin)
    others = (e for e in entries if e.shown.gender == "none" and e.shown.group != "flags")
    names = (e for e in entries if e.shown.group != "flags")
    seen: set[str] = set()
    questions: list[Question] = []
    while len(questions) < count:
        kind = KINDS[len(questions) % len(KINDS)]
        try:
            if kind == TEXT:
                content = Content.of(f"a picture of {next(names).shown.name}")
            elif kind == IMAGE:
                content = Content.of("", twemoji.picture(next(others).hexcode))
            else:
                gender, skin = rng.choice(("woman", "man")), rng.choice(_SKIN)
                change = f"the same, but as a {gender} with {skin} skin tone"
                content = Content.of(change, twemoji.picture(next(people).hexcode))
        except NotFoundError:
            continue  # Twemoji is an older set and lacks some
        except StopIteration:
            raise ValueError(f"the corpus has no {count} different questions to ask") from None
        if content.content_hash not in seen:
            seen.add(content.content_hash)
            questions.append(Question(kind, content))
    return questions
