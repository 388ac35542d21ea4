"""Several data sets as one source, each with its share of the sub-batches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.data.examples import Document, Example
from training.data.rows import ExampleSource, Row, RowSource, pick
from tte_jax.errors import InvalidInputError


@dataclass(frozen=True)
class Weighted:
    """A data set of a mix. `weight`: its share of the sub-batches, relative to the others'."""

    name: str
    source: ExampleSource
    weight: float = 1.0


class Mixture(RowSource):
    """The data sets one behind the other; examples carry the part's name as `dataset`.

    Attributes:
      parts: the data sets.
      starts: index of each part's first example, and the total at the end.

    Raises:
      InvalidInputError: two parts have one name, or a part is empty.
    """

    def __init__(self, parts: Sequence[Weighted]) -> None:
        names = [part.name for part in parts]
        if twice := {n for n in names if names.count(n) > 1}:
            raise InvalidInputError(f"data sets named twice: {', '.join(sorted(twice))}")
        if not parts:
            raise InvalidInputError("a mixture needs at least one data set")
        self.parts = tuple(parts)
        self.starts = [0]
        for part in parts:
            if not len(part.source):
                raise InvalidInputError(f"the data set {part.name} is empty")
            self.starts.append(self.starts[-1] + len(part.source))

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """(part, index within it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} examples, asked for {index}")
        part = bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def __getitem__(self, index: int) -> Example:
        part, at = self.place(index)
        return replace(self.parts[part].source[at], dataset=self.parts[part].name)

    def document(self, index: int, at: int) -> Document:
        part, inner = self.place(index)
        return pick(self.parts[part].source, inner, at)

    def row(self, index: int) -> Row:
        part, at = self.place(index)
        source = self.parts[part].source
        if not isinstance(source, RowSource):
            raise TypeError(f"{self.parts[part].name} has examples but no rows")
        return replace(source.row(at), dataset=self.parts[part].name)


def by_dataset(source: ExampleSource) -> Mixture:
    """A source of one or several data sets as a mixture.

    A mixture is itself, and what wraps one (ECRs, mined negatives) keeps its weights. Any other
    source is asked for the data set of each example, which then weighs as much as it has examples;
    only a source that cannot tell is read for it.
    """
    if isinstance(source, Mixture):
        return source
    inner: object = source
    # A subset has its own order, and so ends the search.
    while not isinstance(inner, Subset) and (inner := getattr(inner, "source", None)) is not None:
        if isinstance(inner, Mixture) and len(inner) == len(source):
            return Mixture(
                [
                    Weighted(p.name, Subset(source, range(*inner.starts[i : i + 2])), p.weight)
                    for i, p in enumerate(inner.parts)
                ]
            )
    members: dict[str, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(_dataset(source, index), []).append(index)
    return Mixture(
        [Weighted(name, Subset(source, rows), float(len(rows))) for name, rows in members.items()]
    )


def _dataset(source: ExampleSource, index: int) -> str:
    tell = getattr(source, "dataset", None)
    if tell is not None:
        return tell(index)
    inner = getattr(source, "source", None)
    if inner is not None and not isinstance(source, Subset) and len(inner) == len(source):
        return _dataset(inner, index)  # what wraps a source keeps its order
    one = source.row(index) if isinstance(source, RowSource) else source[index]
    return one.dataset


class Subset(RowSource):
    """Some examples of a source, in the given order."""

    def __init__(self, source: ExampleSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]

    def document(self, index: int, at: int) -> Document:
        return pick(self.source, self.indices[index], at)

    def row(self, index: int) -> Row:
        if not isinstance(self.source, RowSource):
            raise TypeError("the source has examples but no rows")
        return self.source.row(self.indices[index])
