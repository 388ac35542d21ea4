"""Metadata and filters in Milvus's terms.

Metadata go into three JSON fields, one for each type, so that a flag and a number, or a number and
a text, are never compared. Milvus and milvus-lite differ in how names and texts are quoted and how
LIKE is escaped; hexadecimal names and texts need neither, and keep equality and prefixes (of
UTF-8). Where a field is missing, a comparison is neither true nor false to Milvus and `not` of it
is not true either; so a negation is moved down to the comparisons, which say what a missing field
means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tte_jax.content import Metadata, MetadataValue
from tte_jax.filters import AllOf, AnyOf, Equals, Filter, Not, OneOf, Prefix, Range

NUMBERS, TEXTS, FLAGS = "numbers", "texts", "flags"
_NOTHING, _EVERYTHING = 'id == ""', 'id != ""'  # no id is empty


def encode(metadata: Metadata) -> dict[str, dict[str, Any]]:
    """The three JSON fields of a document."""
    out: dict[str, dict[str, Any]] = {NUMBERS: {}, TEXTS: {}, FLAGS: {}}
    for name, value in metadata.items():
        out[_kind(value)][_key(name)] = _value(value)
    return out


def expression(condition: Filter, *, negated: bool = False) -> str:
    """A boolean expression that is true for exactly the documents that `condition` matches."""
    if isinstance(condition, Not):
        return expression(condition.filter, negated=not negated)
    if isinstance(condition, AllOf | AnyOf):
        parts = [expression(part, negated=negated) for part in condition.filters]
        both = isinstance(condition, AllOf) is not negated
        return _joined(parts, "and" if both else "or")
    if isinstance(condition, OneOf):
        parts = [
            expression(Equals(condition.field, value), negated=negated)
            for value in condition.values
        ]
        return _joined(parts, "and" if negated else "or")
    if isinstance(condition, Equals):
        return _comparisons(
            _kind(condition.value), condition.field, [f"== {_literal(condition.value)}"], negated
        )
    if isinstance(condition, Prefix):
        like = f'like "{condition.prefix.encode().hex()}%"'
        return _comparisons(TEXTS, condition.field, [like], negated)
    assert isinstance(condition, Range)
    ends = []
    if condition.at_least is not None:
        ends.append(f">= {_literal(condition.at_least)}")
    if condition.below is not None:
        ends.append(f"< {_literal(condition.below)}")
    return _comparisons(NUMBERS, condition.field, ends, negated)


def _comparisons(kind: str, name: str, comparisons: Sequence[str], negated: bool) -> str:
    """The field is there and all comparisons hold; negated, that it is not so."""
    field = f'{kind}["{_key(name)}"]'
    parts = [f"exists {field}", *(f"({field} {comparison})" for comparison in comparisons)]
    if not negated:
        return f"({' and '.join(parts)})"
    return f"(not {parts[0]}{''.join(f' or not {part}' for part in parts[1:])})"


def _joined(parts: list[str], word: str) -> str:
    """Balanced, since a chain of a thousand is as deep as it is long to a parser."""
    if not parts:
        return _EVERYTHING if word == "and" else _NOTHING
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return f"({_joined(parts[:half], word)} {word} {_joined(parts[half:], word)})"


def _kind(value: MetadataValue) -> str:
    if isinstance(value, bool):
        return FLAGS
    return TEXTS if isinstance(value, str) else NUMBERS


def _key(name: str) -> str:
    return "k" + name.encode().hex()


def _value(value: MetadataValue) -> Any:
    if isinstance(value, str):
        return value.encode().hex()
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return float(value)
    return value


def _literal(value: MetadataValue) -> str:
    value = _value(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)
