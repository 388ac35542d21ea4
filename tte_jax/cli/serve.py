"""`tte serve`: the five services with the built-in models and corpus, until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tte_jax.builtin import models as builtin_models
from tte_jax.cli import connection, corpus, exits, launch, options, state
from tte_jax.cli.output import Output
from tte_jax.errors import InvalidInputError

ROLES = ("reasoner", "embedder", "reranker")


def serve(
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the gateway; 0 = any free one.", show_default="50060"
        ),
    ] = None,  # fmt: skip
    data_dir: options.DataDir = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            help="role=DIR with the roles reasoner, embedder, reranker, or one DIR for reasoner "
            "and embedder; a DIR is a Hugging Face model directory. Default: the built-in models.",
        ),
    ] = None,
    corpus_: Annotated[
        bool,
        typer.Option(
            "--corpus/--no-corpus", envvar="TTE_SERVE_CORPUS", help="Ingest the built-in corpus."
        ),
    ] = True,
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
    flags = model_flags(models or [])
    if port is not None:
        flags.append(f"--port={port}")
    began = time.monotonic()
    try:
        with launch.services(folder, wait_s=start_timeout, out=out, flags=flags) as started:
            gateway = started.address("gateway")
            out.show(f"Serving on {gateway} after {time.monotonic() - began:.1f} s.")
            made = None
            if corpus_:
                made = _ingest(started, folder, out)
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


def model_flags(given: list[str]) -> list[str]:
    """`--models` values as flags of the services. Raises NotFoundError for a directory that is
    none, InvalidInputError for an unknown role."""
    chosen: dict[str, str] = {}
    for value in given:
        role, separator, directory = value.partition("=")
        if not separator:
            role, directory = "", value
        elif role not in ROLES:
            raise InvalidInputError(
                f"--models {value!r}: {role!r} is not one of {', '.join(ROLES)}.", field="--models"
            )
        path = str(builtin_models.resolve(directory).absolute())
        for name in (role,) if role else ("reasoner", "embedder"):
            chosen[name] = path
    return [f"--{role}-model={path}" for role, path in chosen.items()]


def _ingest(started: launch.Started, folder: Path, out: Output) -> corpus.Ingested:
    versions = launch.model_versions(started)
    with connection.connect(started.address("gateway")) as client:
        made = corpus.ensure(
            client,
            data_dir=folder,
            models={role: versions.get(role, "") for role in ("reasoner", "embedder")},
            stored_now=launch.stored_documents(started),
            out=out,
        )
    how = "from the last time" if made.cached else f"ingested in {made.seconds:.0f} s"
    out.show(f"Corpus: {made.documents:,} OpenMoji pictures, {how}.")
    return made


def _how_to_query(gateway: str, out: Output) -> None:
    usual = state.USUAL_ADDRESSES["gateway"]
    address = "" if gateway == usual else f" --address {gateway}"
    out.show(
        escape(
            "\nTry, in another terminal:\n"
            f"  tte search{address} a smiling cat\n"
            f"  tte search{address} --image picture.png\n"
            f"  tte search{address} --image person.png --explain "
            '"the same, but as a woman with dark skin tone"\n'
            "Ctrl-C stops everything."
        )
    )
