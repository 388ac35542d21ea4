"""Known false negatives: a share of the documents stands twice, and mining is not told.

A duplicate answers the same queries as its original, under another key and without a group. What
mining makes of it can then be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from training.data.examples import Document, Example
from training.data.rows import ExampleSource
from training.mining.miner import allowed
from training.mining.records import Record
from training.mining.rounds import Round
from training.mining.table import Table
from tte_jax.errors import InvalidInputError


class WithDuplicates:
    """A source with some of its documents twice.

    A duplicate is put among the given negatives of an example far away in the same data set, which
    makes it a document of the corpus and of nothing else.

    Args:
      source: without duplicates.
      table: of `source`.
      share: of each data set's documents, in (0, 1].
      copy: makes the duplicate of a document; the key must be another.
      seed: another seed duplicates others.

    Attributes:
      originals: key of a duplicate → key of what it is a duplicate of.
    """

    def __init__(
        self,
        source: ExampleSource,
        table: Table,
        *,
        copy: Callable[[Document], Document],
        share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise InvalidInputError(f"share is {share}: expected more than 0, at most 1")
        self.source = source
        self.originals: dict[str, str] = {}
        self._added: dict[int, list[Document]] = {}
        rng = np.random.default_rng(seed)
        for dataset in range(len(table.datasets)):
            documents = [i for i, d in enumerate(table.documents) if d.dataset == dataset]
            examples = [i for i, q in enumerate(table.queries) if q.dataset == dataset]
            for number in rng.permutation(documents)[: round(share * len(documents))]:
                original = table.document(source, int(number))
                made = copy(original)
                if made.key == original.key:
                    raise InvalidInputError("the copy has the key of its original")
                self.originals[made.key] = original.key
                owner = examples.index(table.documents[number].example)
                place = examples[(owner + len(examples) // 2) % len(examples)]
                self._added.setdefault(place, []).append(made)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        added = tuple(self._added.get(index, ()))
        return replace(example, negatives=example.negatives + added, negative_scores=())


def renamed(document: Document) -> Document:
    """The same content under a new key, as where two ids name one file."""
    return replace(document, key=f"{document.key}:again")


@dataclass(frozen=True)
class Found:
    """False negatives of one arm.

    Attributes:
      duplicates: pairs of a query and a duplicate of its right document among the negatives.
      kept_out: share of the pairs among the candidates that are not among the negatives.
      same_group: negatives of the query's group, where mining was not told the groups.
      negatives: all negatives.
      dropped: share of the candidates that the filter took for right answers.
      without: share of queries left without negatives.
    """

    duplicates: int
    kept_out: float
    same_group: int
    negatives: int
    dropped: float
    without: float


def count(
    table: Table,
    found: np.ndarray,
    round: Round,
    originals: Mapping[str, str],
    groups: Mapping[str, str] | None = None,
    *,
    negatives: int = 0,
    percents: Sequence[float] = (),
) -> dict[str, object]:
    """Figures of a reranker round over data with duplicates.

    Args:
      table: of the data with duplicates.
      found: [Q, K] of `candidates.nearest`.
      round: of the arm "reranker"; it also tells what would be without its filter.
      originals: of `WithDuplicates`.
      groups: document key → group, where `table` has none.
      negatives: of a query at most; 0 = as many as were mined.
      percents: stricter t of the filter to count by, below the round's. A round with more
        negatives than are counted holds what these would have taken instead.

    Returns:
      "pairs": queries with a duplicate of their right document in the corpus; "candidates": those
      of them whose duplicate is among the candidates; for each arm, and for "reranker, t = …" of
      each percent, its `Found`.

    Raises:
      InvalidInputError: a percent is above the round's, whose scores then are not there.
    """
    rules = round.manifest["rules"]
    limit = negatives or rules["negatives"]
    if any(not 0.0 < t <= rules["percent_of_positive"] for t in percents):
        raise InvalidInputError(
            f"percents {list(percents)}: expected more than 0 and at most the round's "
            f"{rules['percent_of_positive']}",
            field="percents",
        )
    duplicates: dict[tuple[int, str], list[str]] = {}
    for document in table.documents:
        if document.key in originals:
            place = document.dataset, originals[document.key]
            duplicates.setdefault(place, []).append(document.key)
    tallies: dict[str, Counter[str]] = {}
    pairs = seen = looked_at = 0
    for index, query in enumerate(table.queries):
        near = [table.documents[i].key for i in allowed(table, query, found[index])]
        looked_at += len(near)
        right = [table.documents[p].key for p in query.positives]
        twins = [one for key in right for one in duplicates.get((query.dataset, key), ())]
        group = next((groups[k] for k in right if k in groups), "") if groups else ""
        pairs += len(twins)
        seen += sum(one in near for one in twins)
        for arm, (chosen, dropped) in _chosen(round[index], near, limit, percents).items():
            tally = tallies.setdefault(arm, Counter())
            tally["dropped"] += dropped
            tally["without"] += not chosen
            tally["negatives"] += len(chosen)
            tally["duplicates"] += sum(one in chosen for one in twins)
            if groups and group:
                tally["same_group"] += sum(groups.get(key) == group for key in chosen)
    queries = max(1, len(table.queries))
    return {
        "queries": len(table.queries),
        "documents": len(table.documents),
        "duplicates": len(originals),
        "pairs": pairs,
        "candidates": seen,
        "arms": {
            arm: asdict(
                Found(
                    duplicates=tally["duplicates"],
                    kept_out=1 - tally["duplicates"] / max(1, seen),
                    same_group=tally["same_group"],
                    negatives=tally["negatives"],
                    dropped=tally["dropped"] / max(1, looked_at),
                    without=tally["without"] / queries,
                )
            )
            for arm, tally in tallies.items()
        },
    }


def _chosen(
    record: Record, near: list[str], limit: int, percents: Sequence[float]
) -> dict[str, tuple[list[str], int]]:
    """Arm → (keys of its negatives, how many candidates its filter dropped)."""
    scored = (*record.false_negatives, *record.negatives)  # by falling score
    kept = [one.key for one in record.negatives[:limit]]
    found = {
        "embedder": (near[:limit], 0),
        "reranker-unfiltered": ([one.key for one in scored[:limit]], 0),
        "reranker": (kept, len(record.false_negatives)),
    }
    for t in percents:
        cut = np.float32(t) * np.float32(record.positive_score or 0.0)
        below = [one.key for one in scored if np.float32(one.score or 0.0) < cut]
        found[f"reranker, t = {t:g}"] = (below[:limit], len(scored) - len(below))
    return found
