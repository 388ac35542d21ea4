"""A training set that does not say which documents are of one kind."""

from __future__ import annotations

from dataclasses import replace

from training.data.examples import Document, Example
from training.data.rows import ExampleSource, pick


class Ungrouped:
    """A source without its groups: what mining must find out by itself, as where only the pair
    that somebody clicked on is known."""

    def __init__(self, source: ExampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return replace(self.source[index], group="")

    def document(self, index: int, at: int) -> Document:
        """See `rows.pick`."""
        return pick(self.source, index, at)
