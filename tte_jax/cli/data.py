"""`tte data`: training data, before a run."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from tte_jax.cli import options

app = typer.Typer(name="data", no_args_is_help=True, help="Training data.")


@app.callback()
def _group() -> None:
    """Training data."""


@app.command()
def check(
    data: Annotated[
        str,
        typer.Argument(
            help="jsonl:FILE, hf:FOLDER, mmeb:YAML or emoji:FOLDER, with ?OPTION=VALUE behind it.",
            show_default=False,
        ),
    ],
    evaluation: Annotated[
        str, typer.Option("--eval", help="Examples that must not be trained on.")
    ] = "",
    decode: Annotated[bool, typer.Option(help="Open every image.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A finding that is no error here; several times.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Find missing media, duplicate targets, label leaks and overlap with an evaluation.

    Exit code 1 when something was found that would spoil a run.
    """
    # The trainers build on this library, which therefore starts them instead of importing them.
    command = [sys.executable, "-m", "training.data.check", data]
    command += [f"--eval={evaluation}"] if evaluation else []
    command += [f"--allow={name}" for name in allow or ()]
    command += ["--decode"] * decode + ["--json"] * json
    done = subprocess.run(command, check=False)
    raise typer.Exit(done.returncode)
