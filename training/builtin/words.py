"""The words by which a concept may be known."""

from __future__ import annotations

import re

from training.data.concepts import Concept

_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)?")
_EMPTY = frozenset("a an and the of on in with at to for or".split())


def words(text: str) -> list[str]:
    """Lower-case words of a text, without articles and prepositions."""
    return [w for w in _WORD.findall(text.lower()) if w not in _EMPTY]


def concept_words(concept: Concept) -> list[str]:
    """Distinct words of the name, the tags and the attributes, in that order."""
    texts = [concept.name, *concept.tags, concept.hair, concept.direction]
    if concept.skin != "none":
        texts.append(f"{concept.skin} skin tone".replace("-", " "))
    if concept.gender not in ("none", "person"):
        texts.append(concept.gender)
    found = [w for t in texts if t and t != "none" for w in words(t)]
    return list(dict.fromkeys(found))
