"""`tte status`: what runs, where, and whether it is well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tte_jax.cli import connection, exits, inspection, options
from tte_jax.cli.output import Output


def status(
    address: options.Address = "",
    timeout: Annotated[
        float,
        typer.Option(envvar="TTE_TIMEOUT", min=0.001, help="Seconds to wait for each service."),
    ] = 2.0,
    json: options.Json = False,
) -> None:
    """Show the services: health, model, documents. Exit code 4 unless all are serving.

    With --address only the gateway there is asked.
    """
    out = Output(json=json)
    where = {"gateway": connection.checked(address)} if address else connection.addresses()
    seen = inspection.look(where, timeout_s=timeout)
    table = Table("service", "address", "health", "about")
    for one in seen:
        colour = "green" if one.health == inspection.SERVING else "red"
        table.add_row(
            one.service, one.address, f"[{colour}]{one.health}[/]", escape(summary(one.about))
        )
    out.show(table)
    well = all(one.health == inspection.SERVING for one in seen)
    out.document(lambda: {"serving": well, "services": [one.as_json() for one in seen]})
    if not well:
        if all(one.health == inspection.UNREACHABLE for one in seen):
            out.err.print("Nothing is running there. Start it with `make serve` (or `tte serve`).")
        raise typer.Exit(exits.UNAVAILABLE)


def summary(about: Mapping[str, Any]) -> str:
    """A service's account of itself on one line."""
    if "model_name" in about:
        late = about["compile_count"] - about["warm_compile_count"]
        compiled = f", {late} compiled after warm-up" if late else ""
        return (
            f"{about['model_name']} {about['model_version']} ({about['architecture']}, "
            f"{about['dtype']} on {about['device']}), {about['queue_depth']} waiting{compiled}"
        )
    if "documents" in about:
        return (
            f"{about['documents']:,} documents, {about['kind']} search, "
            f"embedder {about['embedder_version'] or 'none yet'}, sequence {about['sequence']}"
        )
    return ""
