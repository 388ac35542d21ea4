"""`tte reason`, `tte embed`, `tte rerank`: one model service at a time."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from tte_jax import limits
from tte_jax.cli import options, views
from tte_jax.cli.connection import ask
from tte_jax.cli.files import read_image
from tte_jax.cli.output import Output
from tte_jax.cli.search import query_content
from tte_jax.content import Budget, Side
from tte_jax.errors import InvalidInputError
from tte_jax.stages import EmbedItem, ReasonItem, Sampling

_Text = Annotated[list[str] | None, typer.Argument(help="The text; with --image, the change.")]
_SideOption = Annotated[
    Side, typer.Option(help="Prompts are worded differently for queries and documents.")
]


def _service(role: str) -> object:
    return typer.Option(
        "--address",
        envvar=f"TTE_{role.upper()}_ADDRESS",
        help=f"The {role}, host:port. Default: that of the system that runs on this machine.",
        show_default=False,
    )


def reason(
    text: _Text = None,
    image: options.Images = None,
    side: _SideOption = Side.QUERY,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=limits.MAX_NEW_TOKENS, help="Hard limit of new tokens.")
    ] = Budget.reasoning_tokens,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=limits.MAX_TEMPERATURE, help="Of the draw; 0 = greedy.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Draw among the tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal texts.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text to end before; several are possible.")
    ] = None,
    instruction: options.Instruction = "",
    timeout: options.Timeout = 30.0,
    address: Annotated[str, _service("reasoner")] = "",
    json: options.Json = False,
) -> None:
    """Write the ECR of a text, an image, or an image with a change."""
    out = Output(json=json)
    content = query_content(" ".join(text or []), [read_image(path) for path in image or []])
    item = ReasonItem(content=content, side=side, instruction=instruction)
    sampling = Sampling(temperature, top_p, seed, tuple(stop or ()))
    (ecr,), usage = ask(
        "reasoner",
        address,
        lambda stage: stage.reason(
            [item], max_tokens=max_tokens, timeout_s=timeout, sampling=sampling
        ),
    )
    out.show(escape(ecr.think))
    out.show(f"[bold]{escape(ecr.answer)}[/]")
    out.show(views.usage_table([usage]))
    out.document(lambda: {"reasoning": views.reasoning_json(ecr), "usage": views.usage_json(usage)})


def embed(
    text: _Text = None,
    image: options.Images = None,
    reasoning: Annotated[
        str, typer.Option(help="The content's ECR, as `tte reason --json` gives it in `text`.")
    ] = "",
    side: _SideOption = Side.QUERY,
    dimension: Annotated[
        int, typer.Option(min=0, max=limits.MAX_DIMENSION, help="Keep so many elements; 0 = all.")
    ] = 0,
    instruction: options.Instruction = "",
    timeout: options.Timeout = 30.0,
    address: Annotated[str, _service("embedder")] = "",
    json: options.Json = False,
) -> None:
    """Embed a text, an image, or an image with a change; the vector has length 1."""
    out = Output(json=json)
    content = query_content(" ".join(text or []), [read_image(path) for path in image or []])
    item = EmbedItem(content=content, side=side, reasoning=reasoning, instruction=instruction)
    vectors, usage = ask(
        "embedder",
        address,
        lambda stage: stage.embed([item], dimension=dimension, timeout_s=timeout),
    )
    vector = np.asarray(vectors[0])
    head = " ".join(f"{x:+.4f}" for x in vector[:8])
    out.show(f"{len(vector)} dimensions: {head}{' …' if len(vector) > 8 else ''}")
    out.show(views.usage_table([usage]))
    out.document(
        lambda: {
            "dimension": len(vector),
            "embedding": [float(x) for x in vector],
            "usage": views.usage_json(usage),
        }
    )


def rerank(
    query: Annotated[str, typer.Argument(help="The query's text or ECR.")],
    candidates: Annotated[list[str], typer.Argument(help="The candidates' texts or ECRs.")],
    instruction: options.Instruction = "",
    timeout: options.Timeout = 30.0,
    address: Annotated[str, _service("reranker")] = "",
    json: options.Json = False,
) -> None:
    """Score candidates for a query by their texts, best first."""
    out = Output(json=json)
    if not query.strip():
        raise InvalidInputError("The query is empty.", field="query", reason="EMPTY_QUERY")
    if len(candidates) > limits.MAX_RERANK_CANDIDATES:
        raise InvalidInputError(
            f"{len(candidates)} candidates; at most {limits.MAX_RERANK_CANDIDATES} are scored at "
            "once.",
            field="candidates",
        )
    scores, usage = ask(
        "reranker",
        address,
        lambda stage: stage.rerank(query, candidates, instruction=instruction, timeout_s=timeout),
    )
    order = np.argsort(-np.asarray(scores), kind="stable")
    table = Table("#", "P(yes)", "candidate")
    for rank, index in enumerate(order, start=1):
        table.add_row(str(rank), f"{scores[index]:.3f}", escape(candidates[index]))
    out.show(table)
    out.show(views.usage_table([usage]))
    out.document(
        lambda: {
            "results": [
                {
                    "rank": rank,
                    "index": int(i),
                    "candidate": candidates[i],
                    "score": float(scores[i]),
                }
                for rank, i in enumerate(order, start=1)
            ],
            "usage": views.usage_json(usage),
        }
    )
