"""A round applied to the data that it was mined from: examples with their hard negatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from training.data.examples import Document, Example
from training.data.rows import ExampleSource, pick
from training.mining.records import Record
from training.mining.rounds import Round
from training.mining.table import Table, table_beside
from tte_jax.errors import DataLossError, InvalidInputError


class MinedSource:
    """Examples of `source` with the negatives, teacher scores and positive score of `round`.

    Args:
      source: the data.
      round: of these data.
      table: of these data, see `table.table_of`.
      negatives: at most so many of each example; 0 = all that were mined.
      filtered: False puts likely false negatives back among the negatives, in the order of their
        scores; None = as the round's arm says.
      keep_given: put the example's own negatives behind the mined ones, without scores, which
        then are left out altogether.

    Raises:
      InvalidInputError: the round was mined from other data.
    """

    def __init__(
        self,
        source: ExampleSource,
        round: Round,
        table: Table,
        *,
        negatives: int = 0,
        filtered: bool | None = None,
        keep_given: bool = False,
    ) -> None:
        made_of = round.manifest.get("table")
        if made_of != table.fingerprint or len(table.queries) != len(source):
            raise InvalidInputError(
                f"{round.path} was mined from the table {made_of}, and these data have "
                f"{table.fingerprint} with {len(table.queries)} of {len(source)} examples. Use "
                "the data of that round, or mine again."
            )
        self.source, self._table, self.round = source, table, round
        self._limit = negatives or round.rules.negatives
        self._filtered = round.rules.filters if filtered is None else filtered
        self._keep_given = keep_given
        self._number = {
            (table.datasets[d.dataset], d.key): i for i, d in enumerate(table.documents)
        }

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        record = self.record(index)
        chosen = record.chosen(filtered=self._filtered, count=self._limit)
        documents = tuple(self._document(record.dataset, one.key) for one in chosen)
        scores = tuple(one.score for one in chosen if one.score is not None)
        given: tuple[Document, ...] = ()
        if self._keep_given:
            there = {d.key for d in documents}
            given = tuple(d for d in example.negatives if d.key not in there)
        return replace(
            example,
            negatives=documents + given,
            negative_scores=scores if len(scores) == len(documents) and not given else (),
            positive_score=record.positive_score,
        )

    def dataset(self, index: int) -> str:
        """Name of an example's data set, without reading the example."""
        return self._table.datasets[self._table.queries[index].dataset]

    def document(self, index: int, at: int) -> Document:
        """See `rows.pick`: positives as in the source, negatives as mined."""
        positives = len(self._table.queries[index].positives)
        return (
            pick(self.source, index, at)
            if at < positives
            else self[index].negatives[at - positives]
        )

    @classmethod
    def of(cls, source: ExampleSource, folder: Path) -> MinedSource:
        """A sealed round by its folder, with the table of the loop that it lies in.

        Raises NotFoundError when the table is not there; else as `Round` and `table.load`.
        """
        return cls(source, Round(folder), table_beside(folder))

    def record(self, index: int) -> Record:
        """What the round says of an example: records stand in the order of the examples."""
        record = self.round[index]
        query = self._table.queries[index]
        if (record.dataset, record.example) != (self._table.datasets[query.dataset], query.key):
            raise DataLossError(
                f"record {index} of {self.round.path} is of {record.dataset}/{record.example}, "
                f"expected {query.key}. Mine the round again."
            )
        return record

    def _document(self, dataset: str, key: str) -> Document:
        return self._table.document(self.source, self._number[dataset, key])
