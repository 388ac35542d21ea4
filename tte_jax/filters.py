"""Filters on document metadata: typed conditions joined by and / or / not."""

from __future__ import annotations

from dataclasses import dataclass

from tte_jax.content import Metadata, MetadataValue


@dataclass(frozen=True)
class Equals:
    field: str
    value: MetadataValue

    def matches(self, metadata: Metadata) -> bool:
        return _same(metadata.get(self.field), self.value)


@dataclass(frozen=True)
class OneOf:
    field: str
    values: tuple[MetadataValue, ...]

    def matches(self, metadata: Metadata) -> bool:
        return any(_same(metadata.get(self.field), v) for v in self.values)


@dataclass(frozen=True)
class Range:
    """`at_least <= value < below`; either end may be open (None). Numbers only."""

    field: str
    at_least: float | None = None
    below: float | None = None

    def matches(self, metadata: Metadata) -> bool:
        value = metadata.get(self.field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (self.at_least is None or value >= self.at_least) and (
            self.below is None or value < self.below
        )


@dataclass(frozen=True)
class Prefix:
    field: str
    prefix: str

    def matches(self, metadata: Metadata) -> bool:
        value = metadata.get(self.field)
        return isinstance(value, str) and value.startswith(self.prefix)


@dataclass(frozen=True)
class AllOf:
    filters: tuple[Filter, ...]

    def matches(self, metadata: Metadata) -> bool:
        return all(f.matches(metadata) for f in self.filters)


@dataclass(frozen=True)
class AnyOf:
    filters: tuple[Filter, ...]

    def matches(self, metadata: Metadata) -> bool:
        return any(f.matches(metadata) for f in self.filters)


@dataclass(frozen=True)
class Not:
    filter: Filter

    def matches(self, metadata: Metadata) -> bool:
        return not self.filter.matches(metadata)


Filter = Equals | OneOf | Range | Prefix | AllOf | AnyOf | Not


def _same(a: MetadataValue | None, b: MetadataValue) -> bool:
    # True == 1 in Python; in a filter, a flag and a number are different things.
    return isinstance(a, bool) == isinstance(b, bool) and a == b
