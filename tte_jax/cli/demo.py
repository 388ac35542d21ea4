"""`tte demo`, which is `make demo`: starts everything, asks the demo's queries, stops it all."""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tte_jax.builtin import twemoji
from tte_jax.cascade.messages import SearchQuery, SearchUpdate
from tte_jax.cli import contact_sheet, corpus, exits, launch, options, views
from tte_jax.cli.connection import Client, connect
from tte_jax.cli.demo_queries import QUERIES, DemoQuery
from tte_jax.cli.demo_report import Answer, as_json, describe, not_run, rank_of, sheet_rows
from tte_jax.cli.output import Output
from tte_jax.content import Budget, Content, MediaKind

# The first stage keeps this many, and the demo looks for right answers among all of them.
TOP_K = 50
SHOWN = 6
LEGEND = "green: a right answer · purple: scored by the reranker, with its first-stage rank"


def demo(
    out_dir: Annotated[
        Path, typer.Option("--out", help="Where out.json and out.png are written.")
    ] = Path("demo"),
    data_dir: Annotated[
        Path,
        typer.Option(help="Corpus, caches and logs; kept, so that the next demo starts faster."),
    ] = Path(".tte/demo"),
    models: options.Models = None,
    start_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that the services get to start.")
    ] = 600.0,
    timeout: Annotated[float, typer.Option(min=1.0, help="Deadline of a search, seconds.")] = 60.0,
    json: options.Json = False,
) -> None:
    """Start the services on free ports, search the built-in corpus in three ways, stop.

    Exit code 1 when any stage did not really run.
    """
    out = Output(json=json)
    began = time.monotonic()
    corpus.check()
    folder = data_dir.absolute()
    flags = ["--port=0", *launch.model_flags(models)]
    with launch.services(folder, wait_s=start_timeout, out=out, flags=flags) as s:
        ready_s = time.monotonic() - began
        out.show(f"Services ready after {ready_s:.1f} s (gateway {s.address('gateway')}).")
        with connect(s.address("gateway")) as client:
            versions = launch.model_versions(s)
            made = launch.ensure_corpus(s, client, folder, out)
            answers = [_ask(client, query, timeout, out) for query in QUERIES]
            rows = sheet_rows(answers, lambda id: _picture(client, id), shown=SHOWN)
    report = as_json(
        answers,
        corpus=made,
        models=versions,
        services_ready_s=ready_s,
        query_pictures="Twemoji (CC BY 4.0); the corpus is OpenMoji (CC BY-SA 4.0)",
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "out.json").write_text(jsonlib.dumps(report, ensure_ascii=False, indent=2) + "\n")
    title = f"tte demo: {made.documents:,} OpenMoji pictures, queries by text and Twemoji pictures"
    contact_sheet.write(out_dir / "out.png", title, LEGEND, rows)
    out.show(_summary(answers))
    out.show(f"Wrote {out_dir / 'out.json'} and {out_dir / 'out.png'}.")
    out.document(lambda: report)
    if report["problems"]:
        out.err.print("[bold red]A stage did not really run:[/]")
        for problem in report["problems"]:
            out.err.print(f"  {escape(problem)}")
        raise typer.Exit(exits.FAILED)


def _ask(client: Client, query: DemoQuery, timeout: float, out: Output) -> Answer:
    pictures = [twemoji.picture(query.picture)] if query.picture else []
    request = SearchQuery(
        content=Content.of(query.text, *pictures),
        top_k=TOP_K,
        budget=Budget(candidates=TOP_K),
        deadline_s=timeout,
    )
    started = time.monotonic()
    updates: list[tuple[float, SearchUpdate]] = []
    for update in client.search(request):
        updates.append((time.monotonic() - started, update))
    answer = Answer(query, tuple(updates))
    unseen = "  [dim](held out of training)[/]" if query.unseen else ""
    out.show(f"\n[bold]{escape(query.kind)}: {escape(describe(query))}[/]{unseen}")
    if updates:
        elapsed_s, last = updates[-1]
        out.show(views.query_ecr(last.query_reasoning))
        out.show(views.results_table(last, explain=True, elapsed_s=elapsed_s, limit=SHOWN))
        out.show(views.usage_table(last.usage))
        rank = rank_of(query.expected_ids, last)
        first = rank_of(query.expected_ids, answer.first)
        out.show(f"Right answer at rank {rank or '–'} (first stage: {first or '–'}).")
    for problem in not_run(answer):
        out.err.print(f"[red]{escape(problem)}[/]")
    return answer


def _picture(client: Client, id: str) -> bytes | None:
    """The first image of a document. The corpus may hold pages, videos and texts as well."""
    media = client.get_document(id).content.media
    return next((m.data for m in media if m.kind is MediaKind.IMAGE), None)


def _summary(answers: list[Answer]) -> Table:
    table = Table(title="Rank of the right answer", title_justify="left")
    for column in ("kind", "query", "first stage", "final", "held out"):
        table.add_column(column)
    for answer in answers:
        ranks = ("–", "–")
        if answer.updates:
            ranks = tuple(
                str(rank_of(answer.query.expected_ids, update) or f"> {TOP_K}")
                for update in (answer.first, answer.last)
            )
        held_out = "yes" if answer.query.unseen else ""
        table.add_row(answer.query.kind, escape(describe(answer.query)), *ranks, held_out)
    return table
