"""A model from one on-disk format to another: Hugging Face ↔ Orbax, adapters merged on the way."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from safetensors import SafetensorError, safe_open

from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.weights import adapter as adapters
from tte_jax.weights import checkpoint, hf, source

FORMATS = ("hf", "orbax")
DTYPES = ("float32", "bfloat16", "float16")

# What belongs to a model beside its weights.
_BESIDE = ("*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
_NOT_BESIDE = ("*.safetensors.index.json", checkpoint.MARKER, adapters.CONFIG)
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      files: weight files of the Hugging Face format; none for Orbax, whose layout is its own.
      parameters: how many numbers; `bytes` they take in `dtype`.
    """

    path: Path
    format: str
    dtype: str
    parameters: int
    bytes: int
    files: tuple[str, ...]


def convert(
    path: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = hf.SHARD_BYTES,
    force: bool = False,
) -> Converted:
    """Write the model at `path` to the new directory `out`, which appears when it is complete.

    Args:
      path, adapter: as for `source.resolve`.
      to: one of `FORMATS`; None = the format that `path` does not have, or "hf" with an adapter.
      dtype: one of `DTYPES`; None = that of the files, or float32 where they mix several.
      shard_bytes: as for `hf.export`.
      force: replace a model that `out` holds.

    Raises:
      InvalidInputError: `out` exists, or is the source; an unknown format or dtype.
      Others: as `source.load`.
    """
    target = Path(out).expanduser()
    for value, known, field in ((to, FORMATS, "to"), (dtype, DTYPES, "dtype")):
        if value is not None and value not in known:
            raise InvalidInputError(
                f"{field} {value!r} is not one of {', '.join(known)}", field=field
            )
    found = source.resolve(path, adapter=adapter)
    _check_target(target, found, force)
    orbax = checkpoint.is_checkpoint(found.directory)
    into = to or ("hf" if orbax or found.adapter else "orbax")
    stored = checkpoint.stored_dtype if orbax else _stored_dtype
    kept = dtype or stored(found.directory)
    model = source.load(found.directory, adapter=found.adapter, dtype=jax.numpy.dtype(kept))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that renaming it is one step of one file system.
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=".tmp"))
    try:
        _copy_beside(found, work, kept)
        files = _write(model, work, into, kept, shard_bytes)
        work.chmod(0o755)
        _put(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    parameters = sum(prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    size = parameters * jax.numpy.dtype(kept).itemsize
    return Converted(target, into, kept, parameters, size, files)


def export_like(
    model: MultimodalLM, like: str | Path, out: str | Path, *, dtype: str | None = None
) -> Path:
    """Write a trained model to `out` as a whole Hugging Face directory.

    Args:
      like: directory of the model that it was trained from, of the same shapes: configuration,
        tokenizer and whatever else is not a weight are copied from there.
      out: appears when it is complete; a model that is there already is replaced.
      dtype: one of `DTYPES`; None = that of the files of `like`.

    Raises:
      InvalidInputError: `out` is `like`, holds it, or holds something that is no model.
    """
    target, found = Path(out).expanduser(), source.Source(Path(like))
    _check_target(target, found, force=True)
    kept = dtype or _stored_dtype(found.directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=".tmp"))
    try:
        _copy_beside(found, work, kept)
        hf.export(model, work, dtype=jax.numpy.dtype(kept))
        work.chmod(0o755)
        _put(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write(
    model: MultimodalLM, directory: Path, into: str, dtype: str, shard_bytes: int
) -> tuple[str, ...]:
    if into == "orbax":
        checkpoint.save(model, directory, dtype=dtype)
        return ()
    return tuple(path.name for path in hf.export(model, directory, shard_bytes=shard_bytes))


def _check_target(target: Path, found: source.Source, force: bool) -> None:
    sources = [p.resolve() for p in (found.directory, found.adapter) if p is not None]
    place = target.resolve()
    if any(place == p or place in p.parents for p in sources):
        raise InvalidInputError(
            f"{str(target)!r} is, or holds, what is converted; give another directory.",
            field="out",
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise InvalidInputError(
            f"{str(target)!r} exists already. Give another directory, or --force to replace it.",
            field="out",
            reason="ALREADY_EXISTS",
        )
    if not (target / "config.json").is_file():
        raise InvalidInputError(
            f"{str(target)!r} holds no model (no config.json), so it is not replaced. Remove it"
            " yourself, or give another directory.",
            field="out",
        )


def _put(work: Path, target: Path) -> None:
    """`work` becomes `target`; what was there is moved away first and removed last."""
    if not target.exists():
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=".old"))
    target.rename(old / target.name)
    try:
        work.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _copy_beside(found: source.Source, directory: Path, dtype: str) -> None:
    # An adapter's directory may have a tokenizer and a chat template of its own, but its README
    # is that of the adapter.
    files = [f for pattern in _BESIDE for f in found.directory.glob(pattern)]
    if found.adapter is not None:
        more = [f for pattern in _BESIDE for f in found.adapter.glob(pattern)]
        files += [f for f in more if f.suffix != ".md"]
    for file in files:
        if file.is_file() and not any(file.match(p) for p in _NOT_BESIDE):
            shutil.copyfile(file, directory / file.name)
    config = directory / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(_with_dtype(raw, dtype), indent=2) + "\n")


def _with_dtype(value: Any, dtype: str) -> Any:
    """The configuration saying what the files hold: readers go by it."""
    if not isinstance(value, dict):
        return value
    return {
        key: dtype if key in ("dtype", "torch_dtype") and inner else _with_dtype(inner, dtype)
        for key, inner in value.items()
    }


def _stored_dtype(directory: Path) -> str:
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, "np") as handle:
                found |= {handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118
        except SafetensorError as e:
            raise DataLossError(
                f"{str(path)!r} is damaged ({e}). Download the model again.",
                reason="MODEL_WEIGHTS_DAMAGED",
            ) from e
    return _STORED.get(found.pop(), "float32") if len(found) == 1 else "float32"
