"""Which arms each experiment has, and what the papers say about them.

The papers are TTE (arXiv 2510.05014) and TTE-v2 (arXiv 2602.23369).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tte_jax.evaluation.arms import Arm, Ecr

SHIPPED, ORACLE = "shipped", "oracle"
REASONERS = {
    SHIPPED: "the built-in reasoner",
    "int8": "… with int8 weights",
    "sampled": "… drawing its words (temperature 1)",
    "coarse28": "… seeing 28 × 28 pixels",
    "coarse14": "… seeing 14 × 14 pixels",
    ORACLE: "the true ECR",
}
BUDGETS = (8, 16, 32, 64)
WHOLE = BUDGETS[-1]
DEPTHS = (5, 10, 20)
DEPTH = 10

NONE = Arm(Ecr.NONE, 0)
ECR = Arm(Ecr.FULL, WHOLE)
QAR = Arm(Ecr.FULL, WHOLE, depth=DEPTH, rewrites=DEPTH, rewrite_tokens=WHOLE)


@dataclass(frozen=True, order=True)
class Piece:
    """An arm with one of the reasoners: what is run, and kept, for itself."""

    reasoner: str
    arm: str


@dataclass(frozen=True)
class Comparison:
    """Two rows of an experiment, by their labels, whose difference is tested.

    Attributes:
      says: what the papers claim of `better` against `worse`; "" = nothing, only measured.
    """

    worse: str
    better: str
    says: str = ""


@dataclass(frozen=True)
class Experiment:
    """Attributes: pieces: label of a row → what is run."""

    pieces: dict[str, Piece]
    comparisons: Sequence[Comparison] = field(default_factory=tuple)


def _piece(arm: Arm, reasoner: str = SHIPPED) -> Piece:
    return Piece(reasoner, arm.name)


def _ecr(tokens: int) -> Arm:
    return Arm(Ecr.FULL, tokens)


def _query(tokens: int) -> Arm:
    """Queries within a budget, over candidates that were reasoned about with the whole one."""
    return ECR if tokens == WHOLE else Arm(Ecr.FULL, tokens, document_tokens=WHOLE)


def _rerank(depth: int) -> Arm:
    return Arm(Ecr.FULL, WHOLE, depth=depth)


def _budget() -> Experiment:
    both = {0: _piece(NONE)} | {t: _piece(_ecr(t)) for t in BUDGETS}
    alone = {t: _piece(_query(t)) for t in (0, *BUDGETS)}
    steps = (0, *BUDGETS)
    more = "more tokens, better retrieval"
    pairs = [*zip(steps, steps[1:], strict=False), (0, WHOLE)]
    return Experiment(
        {f"both sides, {t}": p for t, p in both.items()}
        | {f"queries alone, {t}": p for t, p in alone.items()},
        [
            *(Comparison(f"both sides, {a}", f"both sides, {b}", more) for a, b in pairs),
            Comparison("queries alone, 0", f"queries alone, {WHOLE}", more),
        ],
    )


def _ablation() -> Experiment:
    none, ecr, qar = "bi-encoder", "ECR", f"ECR + ECRR + QAR, first {DEPTH}"
    ecrr = {depth: f"ECR + ECRR, first {depth}" for depth in DEPTHS}
    return Experiment(
        {none: _piece(NONE), ecr: _piece(ECR)}
        | {label: _piece(_rerank(depth)) for depth, label in ecrr.items()}
        | {qar: _piece(QAR)},
        [
            Comparison(none, ecr, "TTE is better than the bi-encoder"),
            Comparison(ecr, ecrr[DEPTH], "reranking by ECRs is better than TTE alone"),
            Comparison(ecrr[DEPTH], qar, "rewriting for the query is better still"),
            Comparison(none, ecrr[DEPTH], "TTE-v2 is better than the bi-encoder"),
            *(Comparison(ecrr[a], ecrr[b]) for a, b in zip(DEPTHS, DEPTHS[1:], strict=False)),
        ],
    )


def _strength() -> Experiment:
    cuts = {f"… with {t} tokens": _piece(_ecr(t)) for t in BUDGETS[1::-1]}
    pieces = {title: _piece(ECR, name) for name, title in REASONERS.items()}
    shipped, oracle = REASONERS[SHIPPED], REASONERS[ORACLE]
    stronger = "a stronger reasoner, better retrieval"
    weaker = [REASONERS[name] for name in ("sampled", "coarse28", "coarse14")]
    return Experiment(
        {label: p for label, p in (pieces | cuts).items() if label != oracle}
        | {oracle: pieces[oracle]},
        [
            *(Comparison(label, shipped, stronger) for label in (*weaker, *cuts)),
            Comparison(shipped, oracle, stronger),
            Comparison(REASONERS["int8"], shipped),
        ],
    )


EXPERIMENTS = {"budget": _budget(), "ablation": _ablation(), "strength": _strength()}
ARMS = {
    arm.name: arm
    for arm in (
        NONE,
        *map(_ecr, BUDGETS),
        *map(_query, (0, *BUDGETS)),
        *map(_rerank, DEPTHS),
        QAR,
    )
}


def wanted(experiments: Sequence[str]) -> dict[str, list[Arm]]:
    """Reasoner → its arms, each once, in an order in which arms of the same candidates follow."""
    pieces = {p for name in experiments for p in EXPERIMENTS[name].pieces.values()}
    return {
        reasoner: [arm for name, arm in ARMS.items() if Piece(reasoner, name) in pieces]
        for reasoner in REASONERS
        if any(piece.reasoner == reasoner for piece in pieces)
    }
