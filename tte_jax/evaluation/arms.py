"""The arms of an experiment: with which reasoning, reranked how, for which budget."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from tte_jax import limits
from tte_jax.content import Budget
from tte_jax.errors import InvalidInputError


class Ecr(enum.StrEnum):
    """What of a reasoning (ECR) the embedder and the reranker read."""

    NONE = "none"
    FULL = "full"
    THINK = "think"
    ANSWER = "answer"


class Rerank(enum.StrEnum):
    """ECRR reranks by the ECRs that exist; QAR rewrites candidates' ECRs for the query first."""

    OFF = "off"
    ECRR = "ecrr"
    QAR = "ecrr+qar"


@dataclass(frozen=True)
class Arm:
    """One configuration of the cascade.

    Attributes:
      tokens: the hard limit of new tokens of an ECR; 0 without one.
      document_tokens: the limit of the candidates' ECRs; -1 = that of the queries'.
      depth: how many candidates are reranked; 0 = off.
      rewrites, rewrite_tokens: how many candidates QAR rewrites, and with how many tokens each.
    """

    ecr: Ecr = Ecr.FULL
    tokens: int = 64
    depth: int = 0
    rewrites: int = 0
    rewrite_tokens: int = 0
    document_tokens: int = -1

    @property
    def name(self) -> str:
        """Fit for a folder: `none`, `full64`, `full64-ecrr10`, `full64-ecrr10-qar10x32`."""
        parts = [str(self.ecr) + (str(self.tokens) if self.tokens else "")]
        if self.document_tokens >= 0:
            parts.append(f"docs{self.document_tokens}")
        if self.depth:
            parts.append(f"ecrr{self.depth}")
        if self.rewrites:
            parts.append(f"qar{self.rewrites}x{self.rewrite_tokens}")
        return "-".join(parts)

    @property
    def candidate_tokens(self) -> int:
        return self.tokens if self.document_tokens < 0 else self.document_tokens

    def budget(self, *, candidates: int, reasons: bool) -> Budget:
        """What one search may spend. `reasons`: whether this task's queries get an ECR."""
        return Budget(
            reasoning_tokens=self.tokens if reasons else 0,
            candidates=candidates,
            rewrite_depth=self.rewrites,
            rewrite_tokens=self.rewrite_tokens,
            rerank_depth=self.depth,
        )

    def as_json(self) -> dict[str, str | int]:
        fields = asdict(self) | {"document_tokens": self.candidate_tokens}
        return {"name": self.name, **fields, "ecr": str(self.ecr)}


def grid(
    ecrs: Sequence[str],
    reranks: Sequence[str],
    *,
    budgets: Sequence[int],
    depths: Sequence[int],
    rewrites: int,
    rewrite_tokens: int,
) -> list[Arm]:
    """Every combination, each once: no budget without an ECR, no depth without a rerank.

    Raises InvalidInputError for unknown words and numbers that cannot be.
    """
    for flag, numbers, most in (
        ("--budgets", budgets, limits.MAX_NEW_TOKENS),
        ("--depths", depths, limits.MAX_RERANK_CANDIDATES),
        ("--qar-depth", (rewrites,), limits.MAX_REWRITE_DEPTH),
        ("--qar-tokens", (rewrite_tokens,), limits.MAX_NEW_TOKENS),
    ):
        if not numbers or min(numbers) < 1 or max(numbers) > most:
            raise InvalidInputError(
                f"{flag} needs whole numbers of at least 1 and at most {most}, got "
                f"{', '.join(map(str, numbers)) or 'none'}; --ecr none and --rerank off are the "
                "arms without.",
                field=flag,
            )
    arms: dict[Arm, None] = {}
    for ecr, rerank in itertools.product(
        [_word(Ecr, e, "--ecr") for e in ecrs], [_word(Rerank, r, "--rerank") for r in reranks]
    ):
        for tokens in budgets if ecr is not Ecr.NONE else (0,):
            for depth in depths if rerank is not Rerank.OFF else (0,):
                qar = rerank is Rerank.QAR
                # A rewrite beyond what is reranked afterwards is spent for nothing.
                count = min(rewrites, depth) if qar else 0
                arms[Arm(ecr, tokens, depth, count, rewrite_tokens if qar else 0)] = None
    return list(arms)


W = TypeVar("W", Ecr, Rerank)


def _word(kind: type[W], word: str, flag: str) -> W:
    try:
        return kind(word)
    except ValueError:
        raise InvalidInputError(
            f"{flag} {word!r} is not one of {', '.join(kind)}.", field=flag
        ) from None
