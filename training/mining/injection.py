"""Known false negatives: a share of the documents stands twice, and mining is not told.

A duplicate answers the same queries as its original, under another key and without a group. What
mining makes of it can then be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from training.data.examples import Document, Example
from training.data.rows import ExampleSource
from training.mining.miner import allowed
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
    """

    duplicates: int
    kept_out: float
    same_group: int
    negatives: int


def count(
    table: Table,
    found: np.ndarray,
    round: Round,
    originals: Mapping[str, str],
    groups: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Figures of a reranker round over data with duplicates.

    Args:
      table: of the data with duplicates.
      found: [Q, K] of `candidates.nearest`.
      round: of the arm "reranker"; it also tells what would be without its filter.
      originals: of `WithDuplicates`.
      groups: document key → group, where `table` has none.

    Returns:
      "pairs": queries with a duplicate of their right document in the corpus; "candidates": those
      of them whose duplicate is among the candidates; for each arm its `Found`; and the price of
      the filter: share of candidates dropped, share of queries left without negatives.
    """
    limit = round.manifest["rules"]["negatives"]
    duplicates: dict[tuple[int, str], list[str]] = {}
    for document in table.documents:
        if document.key in originals:
            place = document.dataset, originals[document.key]
            duplicates.setdefault(place, []).append(document.key)
    pairs = seen = dropped = looked_at = without = 0
    inside = {"embedder": 0, "reranker-unfiltered": 0, "reranker": 0}
    same = dict.fromkeys(inside, 0)
    total = dict.fromkeys(inside, 0)
    for index, query in enumerate(table.queries):
        record = round[index]
        near = [table.documents[i].key for i in allowed(table, query, found[index])]
        kept = [one.key for one in record.negatives]
        all_scored = [one.key for one in (*record.false_negatives, *record.negatives)]
        chosen = {
            "embedder": near[:limit],
            "reranker-unfiltered": all_scored[:limit],
            "reranker": kept,
        }
        looked_at += len(near)
        dropped += len(record.false_negatives)
        without += not kept
        right = [table.documents[p].key for p in query.positives]
        group = next((groups[k] for k in right if k in groups), "") if groups else ""
        for arm, keys in chosen.items():
            total[arm] += len(keys)
            same[arm] += sum(bool(group) and (groups or {}).get(k) == group for k in keys)
        for key in right:
            for one in duplicates.get((query.dataset, key), ()):
                pairs += 1
                seen += one in near
                for arm, keys in chosen.items():
                    inside[arm] += one in keys
    return {
        "queries": len(table.queries),
        "documents": len(table.documents),
        "duplicates": len(originals),
        "pairs": pairs,
        "candidates": seen,
        "arms": {
            arm: asdict(Found(inside[arm], 1 - inside[arm] / max(1, seen), same[arm], total[arm]))
            for arm in inside
        },
        "dropped_share": dropped / max(1, looked_at),
        "queries_without_negatives": without / max(1, len(table.queries)),
    }
