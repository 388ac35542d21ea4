"""What is said about a concept: the reasoning to learn, the queries people type, the changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from training.builtin.words import words
from training.data.concepts import Concept

MAX_CUES = 3

_TEMPLATES = (
    "{x}", "{x}", "{x}", "{x}", "a {x}", "the {x}", "picture of {x}", "a picture of a {x}",
    "image of {x}", "{x} emoji", "find {x}", "show me a {x}", "icon of {x}",
)  # fmt: skip
_CHANGES = (
    "{x}", "the same, but {as_x}", "the same, but {as_x}", "the same {as_x}", "make it {x}",
    "but {as_x}", "change to {x}", "same picture {as_x}",
)  # fmt: skip

_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def label(concept: Concept) -> str:
    """The answer line: emojibase's label in lower case, without colons."""
    return concept.label.lower().replace(": ", ", ").replace("’", "'")


class Reasonings:
    """The ECR that a concept should get: kind, cues from coarse to fine, attributes, label.

    Cues are the tags, the ones shared by most concepts first, so that what is written early narrows
    down what comes later.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self._shared = Counter(t.lower() for c in concepts for t in set(c.tags))

    def of(self, concept: Concept) -> str:
        """`<think>kind: cues, attributes</think>`, a new line, `Answer: label`."""
        name = set(label(concept).replace(",", " ").split())
        tags = [t.lower() for t in concept.tags if t.lower() not in name]
        tags.sort(key=lambda t: (-self._shared[t], t))
        # Couples have labels of a dozen words; fewer cues keep every ECR about as long.
        cues = tags[: 1 if len(name) > 7 else MAX_CUES]
        if concept.gender in ("man", "woman"):
            cues.append(concept.gender)
        if concept.skin != "none":
            cues.append(f"{concept.skin} skin")
        kind = concept.subgroup.replace("-", " ")
        think = f"{kind}: {', '.join(cues)}" if cues else kind
        return f"<think>{think}</think>\nAnswer: {label(concept)}"


def attributes(concept: Concept) -> str:
    """ "woman with dark skin tone", "man", "medium skin tone" or "" — what a change can ask for."""
    who = concept.gender if concept.gender in ("man", "woman", "person") else ""
    tone = f"{concept.skin} skin tone" if concept.skin != "none" else ""
    return " with ".join(x for x in (who, tone) if x)


def text_query(concept: Concept, rng: np.random.Generator) -> str:
    """Something a person might type for this concept."""
    draw = rng.random()
    tags = [t.lower() for t in concept.tags]
    if draw < 0.15 and concept.shortcodes:
        said = str(rng.choice(concept.shortcodes)).replace("_", " ").replace("-", " ").lower()
        if concept.skin != "none" and "skin" not in said:
            said += f" {concept.skin} skin tone"
    elif draw < 0.45 and len(tags) >= 2:
        count = int(rng.integers(2, min(len(tags), 5) + 1))
        said = (", " if rng.random() < 0.5 else " ").join(rng.permutation(tags)[:count])
        if concept.skin != "none" or concept.gender in ("man", "woman"):
            said += ", " + attributes(concept)
    elif draw < 0.55 and tags:
        said = f"{label(concept)}, {', '.join(rng.permutation(tags)[:3])}"
    else:
        said = label(concept)
        if rng.random() < 0.3:
            said = said.replace(", ", " with " if rng.random() < 0.5 else " ", 1)
    return str(rng.choice(_TEMPLATES)).format(x=said)


def change_query(source: Concept, target: Concept, rng: np.random.Generator) -> str:
    """How to get from one variant of a family to another; names at least what differs."""
    who = target.gender if target.gender in ("man", "woman", "person") else ""
    tone = f"{target.skin} skin tone" if target.skin != "none" else "no skin tone"
    said_who = who and (target.gender != source.gender or rng.random() < 0.3)
    said_tone = target.skin != source.skin or (target.skin != "none" and rng.random() < 0.3)
    if said_tone and target.skin != "none" and rng.random() < 0.3:
        tone = tone.removesuffix(" tone")
    article = "" if rng.random() < 0.3 else "a "
    who = f"{article}{who}"
    if said_who and said_tone:
        what = f"{who} with {tone}"
        as_what = f"as {what}"
    elif said_tone:
        what = as_what = f"with {tone}"
    else:
        what, as_what = who, f"as {who}"
    return str(rng.choice(_CHANGES)).format(x=what, as_x=as_what)


def echo(said: str, *, cues: Sequence[str] = (), more: str = "") -> str:
    """The ECR of a text that names nothing known: its own words, and nothing made up."""
    think = ", ".join([*dict.fromkeys(words(said)), *cues])
    return f"<think>{think}</think>\nAnswer: {said}{more}"


def coined_query(vocabulary: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """(query, ECR) of something that no concept is called: words of several names, some of them
    spliced. A model that only ever reads known names answers an unknown one with a known one."""

    def word(*, spliced: bool) -> str:
        one, other = (str(w) for w in rng.choice(vocabulary, 2))
        if not spliced:
            return one
        return one[: int(rng.integers(1, len(one) + 1))] + other[int(rng.integers(len(other))) :]

    # A single word as it is may well be the name of something.
    count = int(rng.integers(1, 5))
    said = " ".join(word(spliced=count == 1 or rng.random() < 0.4) for _ in range(count))
    ecr = echo(said)
    if rng.random() < 0.25:
        tone = str(rng.choice(_TONES))
        ecr = echo(said, cues=[f"{tone} skin"], more=f", {tone} skin tone")
        said = f"{said}, {tone} skin tone"
    return str(rng.choice(_TEMPLATES)).format(x=said), ecr


def changed(source: Concept, target: Concept) -> bool:
    """Whether a change of gender or skin tone leads from one to the other, and to nothing else."""
    return (
        (source.gender, source.skin) != (target.gender, target.skin)
        and source.hair == target.hair
        and source.direction == target.direction
    )
