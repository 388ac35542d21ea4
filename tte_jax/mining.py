"""rHNM: hard negatives chosen by the reranker, as pure functions of scores.

The retriever proposes candidates for a training query, the reranker scores them together with the
known positive, and the rule "percent of positive" splits them: what scores below a threshold
relative to the positive is a true negative, and the hardest of those are worth training on; what
scores above it is probably another right answer (a false negative of the labels) and must not be
pushed away. Source: TTE-v2, hard-negative mining; the threshold's default of 1.0 and seven
negatives are its public code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tte_jax.errors import InternalError, InvalidInputError


@dataclass(frozen=True)
class Mined:
    """What one query's candidates came to.

    Attributes:
      negatives: indices of the hardest true negatives, hardest first, at most `hardest`.
      false_negatives: indices of candidates at or above the threshold, best first.
      threshold: the score below which a candidate counts as a negative.
    """

    negatives: tuple[int, ...]
    false_negatives: tuple[int, ...]
    threshold: float


def percent_of_positive(
    scores: Sequence[float] | np.ndarray,
    positive_score: float,
    *,
    threshold: float = 1.0,
    hardest: int = 7,
    exclude: Sequence[int] = (),
) -> Mined:
    """Splits candidates by `score < threshold * positive_score`.

    Args:
      scores: [N] P(yes) of each candidate in [0, 1].
      positive_score: P(yes) of the known positive.
      threshold: t in (0, 1]; lower is more careful about false negatives.
      hardest: how many negatives to keep; fewer survive when there are not that many.
      exclude: indices that are the positive itself; they are in neither list.

    Ties are broken by the candidates' order, so that the same scores always mine the same.

    Raises:
      InvalidInputError: t or `hardest` out of range.
      InternalError: a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float32)
    if values.ndim != 1:
        raise InvalidInputError(f"scores: expected [N], got shape {list(values.shape)}")
    if not 0.0 < threshold <= 1.0:
        raise InvalidInputError(
            f"threshold: {threshold} is outside (0, 1]", field="threshold", threshold=threshold
        )
    if hardest < 1:
        raise InvalidInputError(f"hardest: {hardest} is below 1", field="hardest")
    if not (np.isfinite(values).all() and np.isfinite(positive_score)):
        raise InternalError("the reranker produced a score that is not a number")
    cut = np.float32(threshold) * np.float32(positive_score)
    order = np.argsort(-values, kind="stable")
    skipped = set(exclude)
    kept = [int(i) for i in order if int(i) not in skipped]
    return Mined(
        negatives=tuple(i for i in kept if values[i] < cut)[:hardest],
        false_negatives=tuple(i for i in kept if values[i] >= cut),
        threshold=float(cut),
    )
