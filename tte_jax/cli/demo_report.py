"""What the demo found: checked for stages that did not run, as JSON, and as a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tte_jax.builtin import twemoji
from tte_jax.cascade.messages import SearchStage, SearchUpdate
from tte_jax.cli import contact_sheet, views
from tte_jax.cli.demo_queries import KINDS, DemoQuery

STAGES = ("reason", "embed", "index", "rerank")


@dataclass(frozen=True)
class Answer:
    """One query of the demo with every update of its search and when it came (seconds)."""

    query: DemoQuery
    updates: tuple[tuple[float, SearchUpdate], ...]

    @property
    def first(self) -> SearchUpdate:
        return self.updates[0][1]

    @property
    def last(self) -> SearchUpdate:
        return self.updates[-1][1]


def rank_of(expected: Sequence[str], update: SearchUpdate) -> int | None:
    """Rank (from 1) of the best right answer in a ranking, None when none is in it."""
    ids = [c.id for c in update.results]
    return next((rank for rank, id in enumerate(ids, start=1) if id in expected), None)


def not_run(answer: Answer) -> list[str]:
    """What shows that a stage did not really run for this query; empty when all did."""
    if not answer.updates:
        return ["the gateway sent no answer"]
    last = answer.last
    used = {u.stage: u for u in last.usage}
    wrong = [f"degraded: {d.stage}: {d.message}" for d in last.degraded]
    wrong += [f"no usage of the stage {stage}" for stage in STAGES if stage not in used]
    if not last.final:
        wrong.append("the last message is not marked final")
    if not last.query_reasoning.tokens or not last.query_reasoning.text:
        wrong.append("the reasoner wrote no ECR for the query")
    if "reason" in used and not used["reason"].tokens_out:
        wrong.append("the reasoner generated no tokens")
    for stage in ("embed", "rerank"):
        if stage in used and not used[stage].tokens_in:
            wrong.append(f"the stage {stage} read no tokens")
    if not last.results:
        wrong.append("nothing was found: the index is empty")
        return wrong
    if answer.first.stage is not SearchStage.FIRST_STAGE:
        wrong.append("no first-stage ranking was sent")
    if last.stage is not SearchStage.RERANKED or last.results[0].rerank is None:
        wrong.append("the results were not reranked")
    if not any(c.reasoning.text for c in last.results):
        wrong.append("no document found has an ECR")
    return wrong


def answer_json(answer: Answer) -> dict[str, Any]:
    """One entry of `queries` in demo/out.json."""
    query, last = answer.query, answer.last
    return {
        "kind": query.kind,
        "query": {"text": query.text, "picture": query.picture, "picture_style": "twemoji"}
        if query.picture
        else {"text": query.text},
        "held_out_of_training": query.unseen,
        "expected_ids": list(query.expected_ids),
        "rank_found": {
            "first_stage": rank_of(query.expected_ids, answer.first),
            "final": rank_of(query.expected_ids, last),
        },
        "ranked_ids": [c.id for c in last.results],
        "problems": not_run(answer),
        **views.search_json(answer.updates),
    }


def summary_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Right answers at rank 1 and within 10, per kind of query, before and after reranking."""
    summary: dict[str, Any] = {}
    for kind in KINDS:
        own = [a for a in answers if a.query.kind == kind and a.updates]
        rows = {}
        for name, update_of in _RANKINGS.items():
            ranks = [rank_of(a.query.expected_ids, update_of(a)) for a in own]
            rows[name] = {
                "hit@1": sum(r == 1 for r in ranks),
                "hit@10": sum(r is not None and r <= 10 for r in ranks),
            }
        summary[kind] = {"queries": len(own), **rows}
    return summary


_RANKINGS: dict[str, Callable[[Answer], SearchUpdate]] = {
    "first_stage": lambda a: a.first,
    "final": lambda a: a.last,
}


def sheet_rows(
    answers: Sequence[Answer], picture_of: Callable[[str], bytes | None], *, shown: int
) -> list[contact_sheet.Row]:
    """The contact sheet's rows; `picture_of` gives the image file of a document id."""
    rows = []
    for answer in answers:
        query = answer.query
        first = {c.id: rank for rank, c in enumerate(answer.first.results, start=1)}
        found = [
            contact_sheet.Found(
                picture=picture_of(c.id),
                name=str(c.metadata.get("name", c.id)),
                cosine=c.cosine,
                rerank=c.rerank,
                first_rank=first.get(c.id),
                right=c.id in query.expected_ids,
            )
            for c in answer.last.results[:shown]
        ]
        ecr = views.ecr_line(answer.last.query_reasoning)
        rows.append(
            contact_sheet.Row(
                text=query.text or "(the picture alone)",
                picture=twemoji.picture(query.picture) if query.picture else None,
                remark=f"ECR: {ecr}",
                found=found,
            )
        )
    return rows


def as_json(answers: Sequence[Answer], **about: Any) -> dict[str, Any]:
    """demo/out.json: `about` first (corpus, models, times), then every query."""
    values = {k: v if isinstance(v, dict | str | int | float) else asdict(v)
              for k, v in about.items()}  # fmt: skip
    return {
        **values,
        "summary": summary_json(answers),
        "problems": [f"{describe(a.query)}: {p}" for a in answers for p in not_run(a)],
        "queries": [answer_json(a) for a in answers],
    }


def describe(query: DemoQuery) -> str:
    """The query on one line, e.g. `picture 1F44D + "the same, but …"`."""
    picture = f"picture {query.picture}" if query.picture else ""
    text = f'"{query.text}"' if query.text else ""
    return " + ".join(part for part in (picture, text) if part)
