"""What a search may ask for. Upper limits are the servers' business (`tte_jax.limits`)."""

from __future__ import annotations

from tte_jax.cascade.messages import SearchQuery
from tte_jax.errors import InvalidInputError


def validate(query: SearchQuery) -> None:
    """Raises `InvalidInputError` for an empty query, a wrong `top_k` or a wrong budget."""
    if query.content.empty:
        raise InvalidInputError(
            "the query is empty: give a text, an image, a video or a page",
            field="query",
            reason="EMPTY_QUERY",
        )
    if query.top_k < 1:
        raise InvalidInputError(f"top_k is {query.top_k}, expected at least 1", field="top_k")
    budget = query.budget
    for name in ("reasoning_tokens", "rewrite_depth", "rewrite_tokens", "rerank_depth"):
        value = getattr(budget, name)
        if value < 0:
            raise InvalidInputError(
                f"budget.{name} is {value}, expected 0 (off) or more", field=f"budget.{name}"
            )
    if budget.candidates < 1:
        raise InvalidInputError(
            f"budget.candidates is {budget.candidates}, expected at least 1",
            field="budget.candidates",
        )
    if budget.rewrite_depth and not budget.rewrite_tokens:
        raise InvalidInputError(
            "budget.rewrite_depth asks for rewrites and budget.rewrite_tokens is 0; "
            "set both, or the depth to 0",
            field="budget.rewrite_tokens",
        )
