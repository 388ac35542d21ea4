"""What the text-only reranker reads: an ECR without its tags, or the raw text."""

from __future__ import annotations

from tte_jax.content import Content, Reasoning
from tte_jax.preprocess.ecr import plain


def rerank_text(reasoning: Reasoning, content: Content | None = None) -> str:
    """`cues. Answer: label` of an ECR; without one, the content's own text (may be empty)."""
    return plain(reasoning) or (content.text if content is not None else "")
