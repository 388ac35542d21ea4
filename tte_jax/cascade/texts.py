"""What the text-only reranker reads: an ECR without its tags, or the raw text."""

from __future__ import annotations

from tte_jax.content import Content, Reasoning


def rerank_text(reasoning: Reasoning, content: Content | None = None) -> str:
    """`cues. Answer: label` of an ECR; without one, the content's own text (may be empty)."""
    if not reasoning.text:
        return content.text if content is not None else ""
    think, answer = reasoning.think.strip(), reasoning.answer.strip()
    if not (think or answer):
        return reasoning.text.strip()
    if not answer:
        return think
    return f"{think.rstrip('.')}. Answer: {answer}" if think else f"Answer: {answer}"
