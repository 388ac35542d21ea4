"""One retrieval task, whatever it was read from: queries, candidates, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tte_jax.content import Content


@dataclass(frozen=True)
class Item:
    """A candidate. Its media are read when `load` is called, not before.

    Attributes:
      name: its id; of two with one name the first counts.
      instruction: task description given to the models.
    """

    name: str
    load: Callable[[], Content]
    instruction: str = ""


@dataclass(frozen=True)
class Query:
    """A query and its right answers.

    Attributes:
      pool: names of its candidates; None = all of the task.
      label: names of the right ones.
      rel_scores: a grade for each of `label`; None = all the same.
    """

    id: str
    load: Callable[[], Content]
    label: tuple[str, ...]
    rel_scores: tuple[float, ...] | None = None
    pool: tuple[str, ...] | None = None
    instruction: str = ""


@dataclass(frozen=True)
class EvalTask:
    """A task ready to be run.

    Attributes:
      candidates: makes the iterator over all candidates; each name once.
      metric: its score, as named in `metrics`.
      ecr_query, ecr_target: the sides that get a reasoning when the arm has one.
      frames: how many frames of a video are looked at; 0 = no video.
      notes: what a reader of the figures must know, such as classes that are missing.
    """

    name: str
    modality: str
    metric: str
    queries: tuple[Query, ...]
    candidates: Callable[[], Iterator[Item]]
    ecr_query: bool = True
    ecr_target: bool = True
    frames: int = 0
    notes: tuple[str, ...] = field(default=())
