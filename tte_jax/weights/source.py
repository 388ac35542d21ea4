"""Where a model comes from: a directory of either format, an adapter with its base, a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.weights import adapter as adapters
from tte_jax.weights import checkpoint, hf, hub


@dataclass(frozen=True)
class Source:
    """Directories on this machine.

    Attributes:
      directory: the whole model, with `config.json`.
      adapter: the PEFT adapter to merge into it, or None.
    """

    directory: Path
    adapter: Path | None = None


def resolve(path: str | Path, *, adapter: str | Path | None = None) -> Source:
    """Find the files; nothing is read but configurations.

    Args:
      path: a model directory, an adapter directory whose base is found by its own configuration,
        or a hub id (`owner/name`, `owner/name@revision`) where no such directory exists.
      adapter: an adapter for the model at `path`, likewise.

    Raises:
      NotFoundError, AccessError: see `hub.fetch`.
      InvalidInputError: two adapters, or an adapter for an Orbax checkpoint.
      PreconditionError: an adapter without a base, or on top of another adapter.
    """
    directory = hub.local(path)
    if not adapters.is_adapter(directory):
        found = Source(directory, None if adapter is None else hub.local(adapter))
    elif adapter is not None:
        raise InvalidInputError(
            f"{str(directory)!r} is an adapter itself; give the model it belongs to, or no second"
            " adapter.",
            field="adapter",
        )
    else:
        found = Source(_base(directory), directory)
    if found.adapter is not None and checkpoint.is_checkpoint(found.directory):
        raise InvalidInputError(
            f"{str(found.directory)!r} is an Orbax checkpoint; an adapter is merged into a Hugging"
            " Face directory. Convert it first (`tte convert --to hf`).",
            field="adapter",
        )
    return found


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: Any = jnp.float32,
    sharding_of: hf.ShardingOf | None = None,
    quantise: str | None = None,
) -> MultimodalLM:
    """Read the model, and merge the adapter where there is one.

    Args:
      path, adapter: as for `resolve`.
      dtype, sharding_of, quantise: as for `hf.load`; see `checkpoint.load` on quantising one.

    Raises: as `resolve`, `hf.load`, `checkpoint.load`, `adapter.read` and `adapter.changes`.
    """
    source = resolve(path, adapter=adapter)
    if checkpoint.is_checkpoint(source.directory):
        return checkpoint.load(
            source.directory, dtype=dtype, sharding_of=sharding_of, quantise=quantise
        )
    change = None
    if source.adapter is not None:
        change = adapters.changes(model_config(source.directory), adapters.read(source.adapter))
    return hf.load(
        source.directory, dtype=dtype, sharding_of=sharding_of, quantise=quantise, change=change
    )


def _base(directory: Path) -> Path:
    settings = adapters.settings(directory)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        raise PreconditionError(
            f"{str(directory / adapters.CONFIG)!r} does not name its base model"
            " (base_model_name_or_path). Load the base and give this directory as `adapter`.",
            reason="ADAPTER_BASE",
        )
    base = hub.local(f"{name}@{revision}" if revision and not Path(name).exists() else name)
    if adapters.is_adapter(base):
        raise PreconditionError(
            f"The base of {str(directory)!r} is the adapter {str(base)!r}; merge that one first.",
            reason="ADAPTER_BASE",
        )
    return base
