"""What every trainer reads: a query, its right documents, and those that are wrong on purpose.

A source of examples is random-access: `len(source)`, `source[i] -> Example`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tte_jax.content import Content


@dataclass(frozen=True)
class Document:  # one side's text/media with its reasoning
    key: str  # content hash: equal keys are the same document
    content: Content
    instruction: str = ""
    ecr: str = ""


@dataclass(frozen=True)
class Example:
    key: str  # unique and stable within the data set
    dataset: str  # sub-batches are homogeneous in it
    query: Document
    positives: tuple[Document, ...]  # ≥ 1
    negatives: tuple[Document, ...] = ()
    negative_scores: tuple[float, ...] = ()  # teacher's P(yes), aligned with negatives; () = none
    positive_score: float | None = None
    group: str = ""  # "" = none; documents of the same group are never negatives
