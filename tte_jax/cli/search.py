"""`tte search`: streams a search and shows it as it gets better."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from tte_jax import limits
from tte_jax.cascade.messages import SearchQuery, SearchUpdate
from tte_jax.cli import options, views
from tte_jax.cli.connection import connect
from tte_jax.cli.files import read_image
from tte_jax.cli.output import Output
from tte_jax.cli.parsing import parse_budget, parse_filters
from tte_jax.content import Budget, Content
from tte_jax.errors import InternalError, InvalidInputError


def search(
    text: Annotated[
        list[str] | None, typer.Argument(help="What to look for; with --image, the change.")
    ] = None,
    image: options.Images = None,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, max=limits.MAX_TOP_K, help="How many results.")
    ] = limits.DEFAULT_TOP_K,
    budget: options.BudgetText = "",
    filter: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            help="Only documents whose metadata has field=value (or field!=value); several must "
            "all hold.",
        ),
    ] = None,
    instruction: options.Instruction = "",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", "-x", help="Show why: the ECRs of query and results, stage timings."
        ),
    ] = False,
    timeout: options.Timeout = 30.0,
    address: options.Address = "",
    json: options.Json = False,
) -> None:
    """Search with text, with an image, or with an image and what should be different.

    tte search a smiling cat
    tte search --image cat.png
    tte search --image person.png the same, but as a woman with dark skin tone
    """
    out = Output(json=json)
    query = SearchQuery(
        content=query_content(" ".join(text or []), [read_image(path) for path in image or []]),
        top_k=top_k,
        instruction=instruction,
        filter=parse_filters(filter or []),
        budget=parse_budget(budget) if budget else Budget(),
        deadline_s=timeout,
    )
    started = time.monotonic()
    updates: list[tuple[float, SearchUpdate]] = []
    with connect(address) as client:
        for update in client.search(query):
            updates.append((time.monotonic() - started, update))
            elapsed_s = updates[-1][0]
            if explain and len(updates) == 1:
                out.show(views.query_ecr(update.query_reasoning))
            # A last message that only confirms what is on the screen is not shown again.
            if len(updates) == 1 or not same_ranking(updates[-2][1], update):
                out.show(views.results_table(update, explain=explain, elapsed_s=elapsed_s))
    if not updates:
        raise InternalError("The gateway ended the search without an answer.")
    last = updates[-1][1]
    if not last.results:
        out.show("Nothing found.")
    if explain:
        out.show(views.usage_table(last.usage))
    if last.degraded and not json:
        out.err.print(views.degraded_lines(last.degraded))
    out.document(lambda: views.search_json(updates))


def query_content(text: str, images: list[bytes]) -> Content:
    """The query as content. Raises InvalidInputError when there is nothing in it."""
    content = Content.of(text.strip(), *images)
    if content.empty:
        raise InvalidInputError(
            "There is nothing to search for: give a text, an --image, or both.",
            field="query",
            reason="EMPTY_QUERY",
        )
    return content


def same_ranking(before: SearchUpdate, after: SearchUpdate) -> bool:
    """Whether a person would see the same table: same stage, ids and scores."""

    def shown(update: SearchUpdate) -> list[tuple[object, ...]]:
        return [(c.id, c.rerank, c.rewrite) for c in update.results]

    return before.stage is after.stage and shown(before) == shown(after)
