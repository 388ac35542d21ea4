"""The small languages of the flags: budgets, filters and metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tte_jax import limits
from tte_jax.content import Budget, MetadataValue
from tte_jax.errors import InvalidInputError
from tte_jax.filters import AllOf, Equals, Filter, Not

# Short spelling → (field of Budget, least, most).
_BUDGET = {
    "reasoning": ("reasoning_tokens", 0, limits.MAX_NEW_TOKENS),
    "candidates": ("candidates", 1, limits.MAX_CANDIDATES),
    "rewrite": ("rewrite_depth", 0, limits.MAX_REWRITE_DEPTH),
    "rewrite_tokens": ("rewrite_tokens", 0, limits.MAX_NEW_TOKENS),
    "rerank": ("rerank_depth", 0, limits.MAX_RERANK_CANDIDATES),
}
_BUDGET_FIELDS = {name: (name, low, high) for name, low, high in _BUDGET.values()} | _BUDGET


def parse_budget(text: str) -> Budget:
    """ "32" (reasoning tokens) or "reasoning=32,rerank=20,…" → `Budget`.

    Keys are those of `Budget` or their short forms reasoning, candidates, rewrite, rerank; what is
    not named keeps its default. Raises InvalidInputError.
    """
    values: dict[str, int] = {}
    for item in text.split(","):
        key, given, value = (part.strip() for part in item.partition("="))
        if not given:
            if "," in text or not key:
                raise _bad_budget(f"{item.strip() or text!r} is not key=value", text)
            key, value = "reasoning", key
        if key not in _BUDGET_FIELDS:
            raise _bad_budget(f"{key!r} is not one of {', '.join(_BUDGET)}", text)
        name, low, high = _BUDGET_FIELDS[key]
        if name in values:
            raise _bad_budget(f"{key} is given twice", text)
        if not value.isdecimal() or not low <= int(value) <= high:
            raise _bad_budget(f"{key} must be a whole number from {low} to {high:,}", text)
        values[name] = int(value)
    return dataclasses.replace(Budget(), **values)


def parse_value(text: str) -> MetadataValue:
    """true/false, a whole number, a number, else text; double quotes force text."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # int() takes "1_000" and float() takes "nan"; neither is meant as a number here.
        if all(c in "+-.0123456789eE" for c in text):
            return number
    return text


def parse_pair(text: str, *, flag: str) -> tuple[str, MetadataValue]:
    """ "field=value" → (field, typed value). Raises InvalidInputError that names `flag`."""
    key, given, value = text.partition("=")
    if not given or not key.strip():
        raise InvalidInputError(
            f"{flag} {text!r} is not field=value.", field=flag, reason="INVALID_PAIR"
        )
    return key.strip(), parse_value(value.strip())


def parse_filters(texts: Sequence[str]) -> Filter | None:
    """ "field=value" and "field!=value" conditions, all of which must hold; None without any."""
    conditions: list[Filter] = []
    for text in texts:
        key, value = parse_pair(text, flag="--filter")
        if key.endswith("!"):
            conditions.append(Not(Equals(key[:-1].rstrip(), value)))
        else:
            conditions.append(Equals(key, value))
    if len(conditions) < 2:
        return conditions[0] if conditions else None
    return AllOf(tuple(conditions))


def _bad_budget(what: str, text: str) -> InvalidInputError:
    return InvalidInputError(
        f"--budget {text!r}: {what}. Give reasoning tokens (--budget 32) or pairs "
        "(--budget reasoning=32,rerank=20).",
        field="--budget",
        reason="INVALID_BUDGET",
    )
