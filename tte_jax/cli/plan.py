"""`tte plan`: bytes per device of a model on a mesh, before anyone rents one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tte_jax import plan as planning
from tte_jax.cli import options
from tte_jax.cli.output import Output
from tte_jax.errors import InvalidInputError
from tte_jax.models.registry import model_config
from tte_jax.models.shapes import QWEN2_VL, shape_config
from tte_jax.sharding import parse_mesh

DTYPES = ("bfloat16", "float16", "float32")
GIB = 2**30


def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(QWEN2_VL)} (Qwen2-VL), or a model directory.")
    ],
    mesh: Annotated[str, typer.Option(help="Sizes of the axes data, fsdp and tp.")] = "data=1",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the whole batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 1024,
    patches: Annotated[
        int, typer.Option(min=0, help="Image patches in one pack; text models have none.")
    ] = 1024,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    device_memory: Annotated[
        float, typer.Option(min=0, help="GiB of a device; more than that is an error. 0 = any.")
    ] = 0.0,
    json: options.Json = False,
) -> None:
    """Show what a model takes per device: weights, KV cache, activations of a forward pass.

    Nothing is allocated and no weights are needed. Exit code 2 when the mesh does not fit.
    """
    out = Output(json=json)
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", field="dtype")
    sizes = parse_mesh(mesh)
    # A size is a name of ours even where a directory has it: ./2B is the directory.
    config = shape_config(model) if model in QWEN2_VL else model_config(Path(model).expanduser())
    made = planning.plan(
        config,
        sizes,
        batch=batch,
        tokens=tokens,
        patches=patches if config.vision else 0,
        dtype=dtype,
    )
    if device_memory and made.total > device_memory * GIB:
        raise InvalidInputError(
            f"The model takes {made.total / GIB:.1f} GiB on each device, which has"
            f" {device_memory:g}: {_parts(made)}. Use more devices (fsdp, tp) or a smaller batch.",
            field="mesh",
            reason="MESH_TOO_SMALL",
        )
    named = " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    table = Table("per device", "bytes", "GiB", title=f"{model} ({dtype}) on {named}")
    for name, size in _rows(made).items():
        table.add_row(name, f"{size:,}", f"{size / GIB:.3f}")
    out.show(table)
    out.show(
        f"{made.parameters:,} parameters; batch {batch} × {tokens} tokens"
        + (f", {patches} image patches." if config.vision else ".")
    )
    for note in made.whole:
        out.note(f"Not split: {note}.")
    out.document(
        lambda: {
            "model": model,
            "mesh": sizes,
            "batch": batch,
            "tokens": tokens,
            "patches": patches if config.vision else 0,
            "dtype": dtype,
            "parameters": made.parameters,
            "bytes_per_device": _rows(made),
            "not_split": list(made.whole),
        }
    )


def _rows(made: planning.Plan) -> dict[str, int]:
    return {
        "weights": made.weights,
        "kv_cache": made.kv_cache,
        "activations": made.activations,
        "total": made.total,
    }


def _parts(made: planning.Plan) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in _rows(made).items())
