"""What a sealed round is like, in numbers worth watching from round to round."""

from __future__ import annotations

import numpy as np

from training.mining.miner import allowed
from training.mining.rounds import Round
from training.mining.table import Table


def figures(round: Round, table: Table, found: np.ndarray | None = None) -> dict[str, float]:
    """Scalars of a round.

    Args:
      found: [Q, K] of `candidates.nearest`; None for the arms that look at none.

    Returns:
      "negatives": of a query, on average, as the round's arm gives them to a trainer; "without":
      share of queries that have none; "refused": share that the reranker could not read. Where a
      teacher scored: "positive_score", the mean; "hardness", the mean of the negatives' scores over
      their positive's; "false_negative_share", how many of the candidates the filter took for right
      answers.
    """
    counts, queries, rules = round.manifest["counts"], max(1, len(round)), round.rules
    records = list(round)
    given = [r.chosen(filtered=rules.filters, count=rules.negatives) for r in records]
    made = {
        "negatives": sum(map(len, given)) / queries,
        "without": sum(not some for some in given) / queries,
        "refused": counts["refused"] / queries,
    }
    given = [some for some, r in zip(given, records, strict=True) if r.positive_score is not None]
    records = [record for record in records if record.positive_score is not None]
    if not records or found is None:
        return made
    made["positive_score"] = float(np.mean([r.positive_score or 0.0 for r in records]))
    hardness = [
        (one.score or 0.0) / r.positive_score
        for r, some in zip(records, given, strict=True)
        if r.positive_score
        for one in some
    ]
    if hardness:
        made["hardness"] = float(np.mean(hardness))
    looked_at = sum(len(allowed(table, q, found[i])) for i, q in enumerate(table.queries))
    made["false_negative_share"] = counts["false_negatives"] / max(1, looked_at)
    return made
