"""What the commands show: tables for people, plain dictionaries for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tte_jax.cascade.messages import Degraded, SearchStage, SearchUpdate
from tte_jax.content import Candidate, Reasoning, Usage

_TITLES = {
    SearchStage.FIRST_STAGE: "First stage (embeddings)",
    SearchStage.REWRITTEN: "Rewritten (QAR)",
    SearchStage.RERANKED: "Reranked",
}


def ecr_line(reasoning: Reasoning | None) -> str:
    """An ECR on one line: "cues → answer"; "" when there is none."""
    if reasoning is None:
        return ""
    parts = (" ".join(p.split()) for p in (reasoning.think, reasoning.answer) if p.strip())
    return " → ".join(parts)


def results_table(
    update: SearchUpdate, *, explain: bool, elapsed_s: float, limit: int | None = None
) -> Table:
    """The candidates of one update (the first `limit`), with the scores of every stage."""
    table = Table(
        title=f"{_TITLES[update.stage]} · {elapsed_s * 1000:.0f} ms", title_justify="left"
    )
    table.add_column("#", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("name", overflow="fold")
    table.add_column("cosine", justify="right")
    if update.stage is SearchStage.RERANKED:
        table.add_column("P(yes)", justify="right")
    if explain:
        table.add_column("why (ECR)", overflow="fold")
    for rank, candidate in enumerate(update.results[:limit], start=1):
        row = [
            str(rank),
            escape(candidate.id),
            escape(str(candidate.metadata.get("name", ""))),
            f"{candidate.cosine:.3f}",
        ]
        if update.stage is SearchStage.RERANKED:
            row.append("–" if candidate.rerank is None else f"{candidate.rerank:.3f}")
        if explain:
            row.append(escape(ecr_line(candidate.rewrite or candidate.reasoning)))
        table.add_row(*row)
    return table


def usage_table(usage: Sequence[Usage]) -> Table:
    """Tokens and times of every stage."""
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    for column in ("tokens in", "out", "cached", "queue ms", "compute ms", "wall ms"):
        table.add_column(column, justify="right")
    table.add_column("model", overflow="fold")
    for u in usage:
        times = (f"{seconds * 1000:.1f}" for seconds in (u.queue_s, u.compute_s, u.wall_s))
        table.add_row(
            escape(f"{u.stage}, within {u.within}" if u.within else u.stage),
            str(u.tokens_in),
            str(u.tokens_out),
            str(u.cached_tokens),
            *times,
            escape(u.model_version),
        )
    return table


def query_ecr(reasoning: Reasoning) -> RenderableType:
    line = ecr_line(reasoning) or "(none: the query was embedded as it is)"
    cut = " (cut by the budget)" if reasoning.truncated else ""
    return Text.assemble(
        ("Query ECR", "bold"), f" [{reasoning.tokens} tokens{cut}]: ", (line, "cyan")
    )


def degraded_lines(degraded: Sequence[Degraded]) -> RenderableType:
    lines = (f"[yellow]Degraded:[/] {escape(d.stage)}: {escape(d.message)}" for d in degraded)
    return Group(*lines)


def reasoning_json(reasoning: Reasoning | None) -> dict[str, Any] | None:
    return None if reasoning is None else dataclasses.asdict(reasoning)


def usage_json(usage: Usage) -> dict[str, Any]:
    return dataclasses.asdict(usage)


def candidate_json(rank: int, candidate: Candidate) -> dict[str, Any]:
    """{"rank", "id", "cosine", "rerank", "metadata", "reasoning", "rewrite"}; a score that no
    stage gave is null."""
    return {
        "rank": rank,
        "id": candidate.id,
        "cosine": candidate.cosine,
        "rerank": candidate.rerank,
        "metadata": dict(candidate.metadata),
        "reasoning": reasoning_json(candidate.reasoning),
        "rewrite": reasoning_json(candidate.rewrite),
    }


def search_json(updates: Sequence[tuple[float, SearchUpdate]]) -> dict[str, Any]:
    """The whole search: the last ranking in full, and the order of every update on the way.

    `updates` pairs each update with the seconds from the request to its arrival.
    """
    elapsed, last = updates[-1]
    return {
        "stage": last.stage.value,
        "final": last.final,
        "elapsed_s": elapsed,
        "query_reasoning": reasoning_json(last.query_reasoning),
        "results": [candidate_json(n, c) for n, c in enumerate(last.results, start=1)],
        "updates": [
            {"stage": u.stage.value, "elapsed_s": s, "ids": [c.id for c in u.results]}
            for s, u in updates
        ],
        "usage": [usage_json(u) for u in last.usage],
        "degraded": [dataclasses.asdict(d) for d in last.degraded],
    }
