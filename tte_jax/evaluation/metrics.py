"""What a ranking is worth: hit@1, NDCG in two modes, and the reference's other figures.

A `Ranked` is one query: the ids in ranked order, and what is right. Scores are per query, so that
`significance` can resample them; the score of a task is their mean.

NDCG@k = Σ rel_i / log2(i + 2) over the first k, divided by that of the ideal order, which counts
relevances above 0. Two modes:

- `exact`: every grade belongs to its own document.
- `compat`: the benchmark's public scorer passes the right ids through `set()` while the grades keep
  their order, so grades land on other documents; a perfect ranking may score below 1. With string
  ids its order changes from run to run. Here the ids are sorted, which is one of its values.

Both are equal unless a query has right documents of unequal grades.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np

from tte_jax.errors import InvalidInputError

CUTS = (1, 5, 10)


class Mode(enum.StrEnum):
    EXACT = "exact"
    COMPAT = "compat"


@dataclass(frozen=True)
class Ranked:
    """One query's ranking.

    Attributes:
      prediction: ids, best first, each once.
      label: the right ids.
      rel_scores: a grade for each of `label`; None = all the same.
    """

    prediction: Sequence[str]
    label: Sequence[str]
    rel_scores: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.rel_scores is not None and len(self.rel_scores) != len(self.label):
            raise InvalidInputError(
                f"A ranking has {len(self.label)} labels and {len(self.rel_scores)} rel_scores; "
                "expected one grade for each label, or null.",
                field="rel_scores",
            )

    def grades(self, mode: Mode = Mode.EXACT) -> dict[str, float]:
        """Id → grade, without those of grade 0 or less; of an id given twice the higher counts."""
        if self.rel_scores is None:
            return dict.fromkeys(self.label, 1.0)
        # The reference refuses repeated ids, so that there is no value of it to be compatible with.
        if mode is Mode.COMPAT and len(set(self.label)) == len(self.label):
            return {k: v for k, v in zip(sorted(self.label), self.rel_scores, strict=True) if v > 0}
        grades: dict[str, float] = {}
        for id, grade in zip(self.label, self.rel_scores, strict=True):
            if grade > 0:
                grades[id] = max(grade, grades.get(id, 0.0))
        return grades


def ndcg(ranked: Ranked, k: int, *, mode: Mode = Mode.EXACT, exponential: bool = False) -> float:
    """NDCG@k of one query; 0 where nothing is right. `exponential`: gains are 2^rel − 1."""
    grades = ranked.grades(mode)
    found = [grades.get(id, 0.0) for id in ranked.prediction[:k]]
    ideal = sorted(grades.values(), reverse=True)[:k]
    best = _dcg(ideal, exponential)
    return _dcg(found, exponential) / best if best > 0 else 0.0


def _dcg(relevances: Sequence[float], exponential: bool) -> float:
    gains = np.asarray(relevances, np.float64)
    if exponential:
        gains = 2.0**gains - 1.0
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def per_query(ranked: Sequence[Ranked], metric: str, mode: Mode = Mode.EXACT) -> np.ndarray:
    """[queries] float64 of a metric named as in the score files: `hit@1`, `ndcg_linear@5`, …"""
    name, _, cut = metric.partition("@")
    if name not in _METRICS or not cut.isdecimal() or not int(cut):
        raise InvalidInputError(
            f"There is no metric {metric!r}; expected one of {', '.join(_METRICS)} with a cut, "
            "such as hit@1.",
            field="metric",
        )
    score, k = _METRICS[name], int(cut)
    return np.array([score(r, k, mode) for r in ranked], np.float64)


def _hits(ranked: Ranked, k: int) -> np.ndarray:
    right = set(ranked.label)
    return np.array([id in right for id in ranked.prediction[:k]], bool)


def _hit(ranked: Ranked, k: int, _: Mode) -> float:
    return float(_hits(ranked, k).any())


def _precision(ranked: Ranked, k: int, _: Mode) -> float:
    return float(_hits(ranked, k).sum()) / k


def _recall(ranked: Ranked, k: int, _: Mode) -> float:
    # With nothing to find, the reference calls everything found.
    return float(_hits(ranked, k).sum()) / len(set(ranked.label)) if ranked.label else 1.0


def _f1(ranked: Ranked, k: int, mode: Mode) -> float:
    p, r = _precision(ranked, k, mode), _recall(ranked, k, mode)
    return 2 * p * r / (p + r) if p + r else 0.0


def _average_precision(ranked: Ranked, k: int, _: Mode) -> float:
    """As in the reference, over at most k right ones; TREC's is in `trec`."""
    hits = _hits(ranked, k)
    if not hits.any():
        return 0.0
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum()) / min(len(set(ranked.label)), k)


def _reciprocal(ranked: Ranked, k: int, _: Mode) -> float:
    hits = _hits(ranked, k)
    return 1.0 / (int(hits.argmax()) + 1) if hits.any() else 0.0


_METRICS = {
    "hit": _hit,
    "ndcg_linear": lambda r, k, m: ndcg(r, k, mode=m),
    "ndcg_exponential": lambda r, k, m: ndcg(r, k, mode=m, exponential=True),
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
    "map": _average_precision,
    "mrr": _reciprocal,
}


def by_chance(ranked: Ranked, pool: int, metric: str) -> float:
    """What an order drawn at random from `pool` candidates scores on average: `hit@1` or an NDCG.

    Raises InvalidInputError for another metric, or a pool that is smaller than what is right.
    """
    grades = ranked.grades()
    if pool < max(1, len(grades)):
        raise InvalidInputError(
            f"A pool of {pool} cannot hold {len(grades)} right candidates.", field="pool"
        )
    if metric == "hit@1":
        return len(grades) / pool
    name, _, cut = metric.partition("@")
    if name != "ndcg_linear":
        raise InvalidInputError(f"Chance is not known for the metric {metric!r}.", field="metric")
    k = int(cut)
    best = _dcg(sorted(grades.values(), reverse=True)[:k], exponential=False)
    # Every place holds the pool's mean grade on average.
    mean = [sum(grades.values()) / pool] * min(k, pool)
    return _dcg(mean, exponential=False) / best if best > 0 else 0.0


def score_table(ranked: Sequence[Ranked], mode: Mode) -> dict[str, float]:
    """Every metric of the reference's score files at 1, 5 and 10, under its names."""
    if not ranked:
        raise InvalidInputError("There are no rankings to score.", field="rankings")
    return {
        f"{name}@{k}": float(np.mean([score(r, k, mode) for r in ranked]))
        for name, score in _METRICS.items()
        for k in CUTS
    }


def differs(ranked: Iterable[Ranked]) -> bool:
    """Whether `exact` and `compat` can differ: some query has right ids of unequal grades."""
    return any(r.rel_scores is not None and len(set(r.rel_scores)) > 1 for r in ranked)


TREC = ("RR", "AP", "R@1", "R@5", "R@10", "R@100", "nDCG@5", "nDCG@10")


def trec(ranked: Sequence[Ranked], names: Sequence[str] = TREC) -> Mapping[str, float]:
    """Means as trec_eval counts them (`ir-measures`): MRR and MAP have no cut, recall is of all.

    Queries without a right id are left out by trec_eval. Grades must be whole numbers there; others
    count as 1 where they are above 0.
    """
    measures = [ir_measures.parse_measure(name) for name in names]
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for number, r in enumerate(ranked):
        grades = r.grades()
        if not grades:
            continue
        whole = all(float(g).is_integer() for g in grades.values())
        qrels[str(number)] = {id: int(g) if whole else 1 for id, g in grades.items()}
        # Scores that fall strictly: the library's own order of ties never shows.
        run[str(number)] = {id: -float(i) for i, id in enumerate(r.prediction)}
    if not qrels:
        return {name: 0.0 for name in names}
    found = ir_measures.calc_aggregate(measures, qrels, run)
    return {name: float(found[m]) for name, m in zip(names, measures, strict=True)}
