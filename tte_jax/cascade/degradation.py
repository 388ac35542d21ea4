"""What a search tells its user when it had to do without something. Pure functions."""

from __future__ import annotations

from tte_jax.cascade.messages import Degraded
from tte_jax.errors import (
    DeadlineExceededError,
    OverloadedError,
    TteError,
    UnavailableError,
)

_ACTOR = {
    "reason": "The reasoner",
    "fetch": "The index",
    "rewrite": "The reasoner",
    "rerank": "The reranker",
}
_CONSEQUENCE = {
    "reason": "the query was searched as it is, without reasoning",
    "fetch": "candidates could not be read again and keep what is known of them",
    "rewrite": "candidates keep the reasoning they were stored with",
    "rerank": "results keep their first-stage order",
}


def failed(stage: str, error: TteError) -> Degraded:
    """`stage` failed. The error's own text is for the log: it may speak of internals."""
    if isinstance(error, DeadlineExceededError):
        happened = "did not answer in time"
    elif isinstance(error, UnavailableError):
        happened = "is not available"
    elif isinstance(error, OverloadedError):
        happened = "is overloaded"
    else:
        happened = "failed"
    return Degraded(stage, error.reason, f"{_ACTOR[stage]} {happened}: {_CONSEQUENCE[stage]}.")


def no_time(stage: str) -> Degraded:
    """`stage` was not begun, because the deadline is near."""
    return Degraded(stage, "DEADLINE_NEAR", f"Too little time was left: {_CONSEQUENCE[stage]}.")


def fewer(stage: str, *, done: int, wanted: int) -> Degraded:
    """`stage` (rewrite or rerank) took fewer candidates, because the deadline is near."""
    verb = "rewritten" if stage == "rewrite" else "reranked"
    message = f"Too little time was left: only {done} of {wanted} candidates were {verb}."
    return Degraded(stage, "DEADLINE_NEAR", message)


def no_query_text() -> Degraded:
    """The reranker compares texts, and the query has none."""
    return Degraded(
        "rerank",
        "NO_QUERY_TEXT",
        "The reranker compares texts, and this query has neither text nor reasoning: "
        f"{_CONSEQUENCE['rerank']}.",
    )


def refused(stage: str, reason: str, *, count: int, wanted: int) -> Degraded:
    """`stage` (rewrite or rerank) does not take some candidates, e.g. because they are too long."""
    rest = {
        "rewrite": "the reasoner and keep the reasoning they were stored with",
        "rerank": "the reranker and stand behind those that were scored",
    }
    return Degraded(
        stage, reason, f"{count} of {wanted} candidates could not be read by {rest[stage]}."
    )
