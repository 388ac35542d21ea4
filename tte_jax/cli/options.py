"""Flags that several commands share. Every flag can be set by an environment variable too: the one
named here, else `TTE_<COMMAND>_<FLAG>`; `tte COMMAND --help` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tte_jax.content import Budget

_JSON = "tte.json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    # Errors are reported by the group, which sees no command's parameters.
    context.meta[_JSON] = value
    return value


def json_wanted(context: typer.Context) -> bool:
    """Whether the command that runs was given --json."""
    return bool(context.meta.get(_JSON, False))


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        envvar="TTE_JSON",
        help="Write one JSON document to stdout and nothing else.",
        callback=_remember_json,
        is_eager=True,
    ),
]
Address = Annotated[
    str,
    typer.Option(
        envvar="TTE_ADDRESS",
        help="Gateway, host:port. Default: the system that runs on this machine, else "
        "127.0.0.1:50060.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(envvar="TTE_TIMEOUT", min=0.001, help="Deadline in seconds."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="TTE_DATA_DIR",
        help="Where the corpus and the state live. Default: ~/.local/share/tte.",
        show_default=False,
    ),
]
Instruction = Annotated[
    str,
    typer.Option(help="The retrieval task in your words; empty = the models' own."),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="An image file; may be given several times."),
]
_DEFAULT = Budget()
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help="What the search may spend: a number of reasoning tokens, or pairs of "
        f"reasoning={_DEFAULT.reasoning_tokens}, candidates={_DEFAULT.candidates}, "
        f"rewrite={_DEFAULT.rewrite_depth}, rewrite_tokens={_DEFAULT.rewrite_tokens}, "
        f"rerank={_DEFAULT.rerank_depth} (these are the defaults; 0 switches a stage off).",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--models",
        help="role=DIR with the roles reasoner, embedder, reranker, or one DIR for reasoner and "
        "embedder; a DIR is a Hugging Face model directory. Default: the built-in models.",
        show_default=False,
    ),
]
Mesh = Annotated[
    str,
    typer.Option(
        envvar="TTE_MESH",
        help="Devices of each model service, as in `tte plan`: fsdp=2,tp=2. Default: one device.",
        show_default=False,
    ),
]
Quantise = Annotated[
    str,
    typer.Option(
        envvar="TTE_QUANTISE",
        help="int8: hold the matrices of linear layers as integers. Default: as loaded.",
        show_default=False,
    ),
]
