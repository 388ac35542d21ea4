"""`tte serve`: the five services with the built-in models and corpus, until Ctrl-C."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tte_jax.cli import connection, corpus, exits, launch, options, state
from tte_jax.cli.output import Output
from tte_jax.index import location


def serve(
    port: Annotated[
        int | None,
        typer.Option(
            envvar="TTE_PORT",
            min=0,
            max=65535,
            help="Port of the gateway, the stages' ports follow it; 0 = any free ones.",
            show_default="50060",
        ),
    ] = None,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    quantise: options.Quantise = "",
    mesh: options.Mesh = "",
    corpus_: Annotated[
        bool,
        typer.Option(
            "--corpus/--no-corpus", envvar="TTE_SERVE_CORPUS", help="Ingest the built-in corpus."
        ),
    ] = True,
    index: Annotated[
        str,
        typer.Option(
            envvar="TTE_INDEX",
            help="Where vectors are searched: scann, milvus://host:19530, or milvus:FILE "
            "(milvus-lite). Default: as the corpus remembers, else scann.",
        ),
    ] = "",
    start_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that the services get to start.")
    ] = 600.0,
    json: options.Json = False,
) -> None:
    """Start everything on this machine. Ctrl-C stops everything.

    The first start compiles the models and ingests the built-in corpus; later ones find both done.
    """
    out = Output(json=json)
    folder = state.data_dir(data_dir)
    flags = [*launch.model_flags(models), *launch.placement_flags(quantise, mesh)]
    if index:
        flags.append(f"--index={location.text_of(index)}")
    if port is not None:
        flags.append(f"--port={port}")
    if corpus_:
        corpus.check()
    began = time.monotonic()
    try:
        with launch.services(folder, wait_s=start_timeout, out=out, flags=flags) as started:
            gateway = started.address("gateway")
            out.show(f"Serving on {gateway} after {time.monotonic() - began:.1f} s.")
            made = None
            if corpus_:
                with connection.connect(gateway) as client:
                    made = launch.ensure_corpus(started, client, folder, out)
            _how_to_query(gateway, out)
            out.document(
                lambda: {
                    "addresses": started.addresses,
                    "data_dir": str(folder),
                    "log": str(started.log),
                    "corpus_documents": made.documents if made else None,
                }
            )
            code = started.process.wait()
    except KeyboardInterrupt:
        out.show("Stopped.")
        return
    out.err.print(f"The services ended with code {code}; their log is {started.log}.", markup=False)
    raise typer.Exit(exits.FAILED)


def _how_to_query(gateway: str, out: Output) -> None:
    usual = state.USUAL_ADDRESSES["gateway"]
    address = "" if gateway == usual else f" --address {gateway}"
    # `make serve` runs it out of a virtual environment that nobody has activated.
    tte = "tte" if shutil.which("tte") else os.path.relpath(Path(sys.executable).with_name("tte"))
    out.show(
        escape(
            "\nTry, in another terminal:\n"
            f"  {tte} search{address} a smiling cat\n"
            f"  {tte} search{address} --image picture.png\n"
            f"  {tte} search{address} --image person.png --explain "
            '"the same, but as a woman with dark skin tone"\n'
            "Ctrl-C stops everything."
        )
    )
