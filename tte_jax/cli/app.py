"""`tte`: the commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tte_jax.cli import (
    convert,
    data,
    demo,
    documents,
    evaluation,
    ingest,
    models,
    options,
    plan,
    search,
    serve,
    status,
    upkeep,
)
from tte_jax.cli.output import Output


class _Group(TyperGroup):
    """Turns every error of a command into a sentence and an exit code (see `exits`)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            # What the framework raises (usage errors, exits) carries its own exit code, and a
            # reader that went away (`tte search cat | head -3`) is no error of ours.
            own = isinstance(error, typer.Exit | typer.Abort | BrokenPipeError)
            if own or hasattr(error, "exit_code"):
                raise
            if os.environ.get("TTE_DEBUG"):
                raise
            code = Output(json=options.json_wanted(ctx)).error(error)
            raise typer.Exit(code) from None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tte {metadata.version('tte-jax')}")
        raise typer.Exit


app = typer.Typer(
    name="tte",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"auto_envvar_prefix": "TTE", "help_option_names": ["-h", "--help"]},
    help="Multimodal retrieval that reasons before it compares.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 not found, 4 no service "
    "answers, 5 deadline passed, 130 interrupted.",
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        # The one flag without an environment variable: TTE_VERSION may well mean something else.
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            allow_from_autoenv=False,
            show_envvar=False,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    del version


app.command("serve")(serve.serve)
app.command("ingest")(ingest.ingest)
app.command("search")(search.search)
app.command("status")(status.status)
app.command("get")(documents.get)
app.command("delete")(documents.delete)
app.command("reason")(models.reason)
app.command("embed")(models.embed)
app.command("rerank")(models.rerank)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.add_typer(evaluation.app)
app.add_typer(upkeep.app)
app.add_typer(data.app)
app.command("convert")(convert.convert)


def main() -> None:
    """Entry point of the `tte` script."""
    app()


if __name__ == "__main__":
    main()
