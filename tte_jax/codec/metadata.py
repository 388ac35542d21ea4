"""Metadata and the filters over it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tte.v1 import document_pb2, filter_pb2
from tte_jax import limits
from tte_jax.codec.contents import check_text
from tte_jax.content import MetadataValue
from tte_jax.errors import InvalidInputError
from tte_jax.filters import AllOf, AnyOf, Equals, Filter, Not, OneOf, Prefix, Range


def encode_metadata(metadata: Mapping[str, MetadataValue]) -> dict[str, document_pb2.MetadataValue]:
    """For the `metadata` field of a message's constructor.

    Raises:
      InvalidInputError: a value is not text, a 64-bit integer, a number or a flag.
    """
    return {key: _encode_value(value, f"metadata[{key!r}]") for key, value in metadata.items()}


def decode_metadata(
    messages: Mapping[str, document_pb2.MetadataValue], at: str
) -> dict[str, MetadataValue]:
    """Raises InvalidInputError for too many, nameless or too long entries and unset values."""
    if len(messages) > limits.MAX_METADATA_FIELDS:
        raise InvalidInputError(
            f"{at} has {len(messages)} entries: at most {limits.MAX_METADATA_FIELDS} are accepted",
            field=at,
            limit=limits.MAX_METADATA_FIELDS,
        )
    return {
        _check_key(key, at): _decode_value(value, f"{at}[{key!r}]")
        for key, value in messages.items()
    }


def encode_filter(condition: Filter) -> filter_pb2.Filter:
    match condition:
        case Equals(field, value):
            one = filter_pb2.Filter.Equals(field=field, value=_encode_value(value, field))
            return filter_pb2.Filter(equals=one)
        case OneOf(field, values):
            several = [_encode_value(value, field) for value in values]
            return filter_pb2.Filter(one_of=filter_pb2.Filter.OneOf(field=field, values=several))
        case Range(field, at_least, below):
            ends = filter_pb2.Filter.Range(field=field, at_least=at_least, below=below)
            return filter_pb2.Filter(range=ends)
        case Prefix(field, prefix):
            return filter_pb2.Filter(prefix=filter_pb2.Filter.Prefix(field=field, prefix=prefix))
        case AllOf(filters):
            return filter_pb2.Filter(all_of=_encode_group(filters))
        case AnyOf(filters):
            return filter_pb2.Filter(any_of=_encode_group(filters))
        case Not(inner):
            return filter_pb2.Filter(negated=encode_filter(inner))


def decode_filter(message: filter_pb2.Filter, at: str) -> Filter:
    """Raises InvalidInputError for an unset, too deep, too large or senseless condition."""
    condition, count = _decode_filter(message, at, depth=1)
    if count > limits.MAX_FILTER_CONDITIONS:
        raise InvalidInputError(
            f"{at} has {count} conditions: at most {limits.MAX_FILTER_CONDITIONS} are accepted",
            field=at,
            limit=limits.MAX_FILTER_CONDITIONS,
        )
    return condition


def _decode_filter(message: filter_pb2.Filter, at: str, depth: int) -> tuple[Filter, int]:
    if depth > limits.MAX_FILTER_DEPTH:
        raise InvalidInputError(
            f"{at} is nested more than {limits.MAX_FILTER_DEPTH} levels deep",
            field=at,
            limit=limits.MAX_FILTER_DEPTH,
        )
    kind = message.WhichOneof("condition")
    if kind is None:
        raise InvalidInputError(f"{at} holds no condition: set exactly one", field=at)
    here = f"{at}.{kind}"
    match kind:
        case "equals":
            equals = message.equals
            value = _decode_value(equals.value, f"{here}.value")
            return Equals(_check_key(equals.field, f"{here}.field"), value), 1
        case "one_of":
            return _decode_one_of(message.one_of, here), 1
        case "range":
            return _decode_range(message.range, here), 1
        case "prefix":
            prefix = message.prefix
            limit = limits.MAX_METADATA_TEXT_CHARS
            check_text(prefix.prefix, f"{here}.prefix", limit)
            return Prefix(_check_key(prefix.field, f"{here}.field"), prefix.prefix), 1
        case "negated":
            inner, count = _decode_filter(message.negated, here, depth + 1)
            return Not(inner), count + 1
        case _:
            filters, count = _decode_group(getattr(message, kind), here, depth)
            return (AllOf if kind == "all_of" else AnyOf)(filters), count + 1


def _encode_group(filters: tuple[Filter, ...]) -> filter_pb2.Filter.Group:
    return filter_pb2.Filter.Group(filters=[encode_filter(f) for f in filters])


def _decode_group(
    group: filter_pb2.Filter.Group, at: str, depth: int
) -> tuple[tuple[Filter, ...], int]:
    if not group.filters:
        raise InvalidInputError(f"{at}.filters is empty: give at least one", field=f"{at}.filters")
    decoded = [
        _decode_filter(inner, f"{at}.filters[{i}]", depth + 1)
        for i, inner in enumerate(group.filters)
    ]
    return tuple(f for f, _ in decoded), sum(count for _, count in decoded)


def _decode_one_of(message: filter_pb2.Filter.OneOf, at: str) -> OneOf:
    if not 1 <= len(message.values) <= limits.MAX_FILTER_VALUES:
        raise InvalidInputError(
            f"{at}.values has {len(message.values)} values: expected 1 to "
            f"{limits.MAX_FILTER_VALUES}",
            field=f"{at}.values",
            limit=limits.MAX_FILTER_VALUES,
        )
    values = tuple(_decode_value(v, f"{at}.values[{i}]") for i, v in enumerate(message.values))
    return OneOf(_check_key(message.field, f"{at}.field"), values)


def _decode_range(message: filter_pb2.Filter.Range, at: str) -> Range:
    at_least = message.at_least if message.HasField("at_least") else None
    below = message.below if message.HasField("below") else None
    if at_least is None and below is None:
        raise InvalidInputError(f"{at} has no ends: set at_least, below or both", field=at)
    if any(end is not None and math.isnan(end) for end in (at_least, below)):
        raise InvalidInputError(f"{at} has an end that is not a number", field=at)
    return Range(_check_key(message.field, f"{at}.field"), at_least, below)


def _check_key(key: str, at: str) -> str:
    if not key:
        raise InvalidInputError(f"{at} holds an empty metadata key", field=at)
    return check_text(key, at, limits.MAX_METADATA_KEY_CHARS)


def _encode_value(value: MetadataValue, at: str) -> document_pb2.MetadataValue:
    # A flag is an int in Python; asked first, it stays a flag.
    if isinstance(value, bool):
        return document_pb2.MetadataValue(bool_value=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return document_pb2.MetadataValue(int_value=value)
    if isinstance(value, float):
        return document_pb2.MetadataValue(double_value=value)
    if isinstance(value, str):
        return document_pb2.MetadataValue(string_value=value)
    raise InvalidInputError(
        f"{at} is {value!r}: expected a text, a 64-bit whole number, a number or a flag", field=at
    )


def _decode_value(message: document_pb2.MetadataValue, at: str) -> MetadataValue:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidInputError(f"{at} has no value: set exactly one kind", field=at)
    value: MetadataValue = getattr(message, kind)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInputError(f"{at} is {value}: expected a finite number", field=at)
    if isinstance(value, str):
        check_text(value, at, limits.MAX_METADATA_TEXT_CHARS)
    return value
