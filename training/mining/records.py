"""One query's negatives as a line of a round, and the rules that chose them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tte_jax.errors import InvalidInputError

RANDOM, EMBEDDER, RERANKER, UNFILTERED = "random", "embedder", "reranker", "reranker-unfiltered"
NONE = "none"
ARMS = (NONE, RANDOM, EMBEDDER, RERANKER, UNFILTERED)
"""Where negatives come from: nowhere; any document of the data set; the nearest ones; those that
the reranker scores highest below the positive; those that it scores highest, whatever they are."""


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen.

    Attributes:
      arm: one of ARMS.
      negatives: of each query, at most.
      percent_of_positive: t in (0, 1]; the reranker's candidates at or above t times the
        positive's score are likely false negatives.
      depth: nearest documents of the same data set that are looked at, right ones included.
      seed: of the random arm.
    """

    arm: str = RERANKER
    negatives: int = 7
    percent_of_positive: float = 1.0
    depth: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise InvalidInputError(
                f"arm is {self.arm!r}: expected one of {', '.join(ARMS)}", field="arm"
            )
        if not 1 <= self.negatives <= 64:
            raise InvalidInputError(
                f"negatives is {self.negatives}: expected 1 to 64", field="negatives"
            )
        if not 0.0 < self.percent_of_positive <= 1.0:
            raise InvalidInputError(
                f"percent_of_positive is {self.percent_of_positive}: expected more than 0, at "
                "most 1",
                field="percent_of_positive",
            )
        if not 1 <= self.depth <= 255:
            raise InvalidInputError(f"depth is {self.depth}: expected 1 to 255", field="depth")

    @property
    def reranks(self) -> bool:
        return self.arm in (RERANKER, UNFILTERED)

    @property
    def filters(self) -> bool:
        return self.arm != UNFILTERED


@dataclass(frozen=True)
class Scored:
    """A document by key, with the teacher's P(yes), or None where no teacher scored it."""

    key: str
    score: float | None = None


@dataclass(frozen=True)
class Record:
    """What mining found for one example.

    Attributes:
      dataset, example: whose; an example's key is unique within its data set.
      positive_score: the teacher's P(yes) of the first positive; None = no teacher.
      negatives: the hardest first.
      false_negatives: what the rules dropped, best first.
      refused: why the reranker could not read this query, "" = it could.
    """

    dataset: str
    example: str
    positive_score: float | None = None
    negatives: tuple[Scored, ...] = ()
    false_negatives: tuple[Scored, ...] = ()
    refused: str = ""

    def chosen(self, *, filtered: bool, count: int) -> tuple[Scored, ...]:
        """At most `count` negatives, the hardest first.

        Args:
          filtered: False puts likely false negatives back among them.
        """
        # Both lists are sorted, and whatever was dropped scored higher.
        return (self.negatives if filtered else self.false_negatives + self.negatives)[:count]

    def to_line(self) -> bytes:
        """One line; equal records are equal bytes."""
        value = {
            "dataset": self.dataset,
            "example": self.example,
            "positive_score": self.positive_score,
            "negatives": [[one.key, one.score] for one in self.negatives],
            "false_negatives": [[one.key, one.score] for one in self.false_negatives],
        }
        if self.refused:
            value["refused"] = self.refused
        return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Raises ValueError, KeyError or TypeError for anything else than a record's line."""
        value = json.loads(line)
        return cls(
            value["dataset"],
            value["example"],
            value["positive_score"],
            tuple(Scored(*one) for one in value["negatives"]),
            tuple(Scored(*one) for one in value["false_negatives"]),
            value.get("refused", ""),
        )
