"""`tte convert`: a model from Hugging Face's format to Orbax and back, adapters merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tte_jax.cli import options
from tte_jax.cli.output import Output
from tte_jax.errors import InvalidInputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    model: Annotated[
        str,
        typer.Argument(help="A model directory of either format, a PEFT adapter, or a hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="hf or orbax. Default: the other format; hf when an adapter is merged.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A PEFT adapter (LoRA or DoRA) to merge.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16. Default: that of the files.", show_default=False
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest weight file of the hf format, such as 500MB.")
    ] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace a model in OUT.")] = False,
    json: options.Json = False,
) -> None:
    """Convert a model between Hugging Face's format and Orbax; nothing runs for it."""
    written = Output(json=json)
    shard_bytes = parse_size(shard_size)
    # JAX takes seconds to import; the other commands do without.
    from tte_jax.weights.convert import convert

    made = convert(
        model,
        out,
        to=to,
        adapter=adapter,
        dtype=dtype,
        shard_bytes=shard_bytes,
        force=force,
    )
    files = f" in {len(made.files)} files" if len(made.files) > 1 else ""
    written.show(
        f"{escape(str(made.path))}: {made.format}, {made.parameters:,} parameters as {made.dtype},"
        f" {made.bytes:,} bytes{files}."
    )
    written.document(
        lambda: {
            "path": str(made.path),
            "format": made.format,
            "dtype": made.dtype,
            "parameters": made.parameters,
            "bytes": made.bytes,
            "files": list(made.files),
        }
    )


def parse_size(text: str) -> int:
    """ "500MB" → 500_000_000; units are decimal, as on the hub.

    Raises InvalidInputError for anything else, and for 0.
    """
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if found is None or not int(found[1]):
        raise InvalidInputError(
            f"--shard-size {text!r} is no size; expected a number with KB, MB or GB, such as 5GB.",
            field="shard_size",
        )
    return int(found[1]) * _UNITS[found[2]]
