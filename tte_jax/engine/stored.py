"""Compiled programs kept between starts under keys that need no tracing.

JAX's own cache is asked with a program's text, so that every start traces and lowers all programs
again: of a small model's second start that was a quarter. Here a key says all that a program is
made from: the code, the versions and settings of JAX, the device, the model's
configuration and the arguments. Whatever is not sure of its key is compiled as before, and so is
what cannot be read. The files are executed, like those of JAX's cache, and lie in its directory,
which belongs to its owner alone.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
_TRACED = ("nn/*.py", "models/*.py", "engine/*.py", "sharding.py")
"""The code that programs are made of; a program of another module is not kept."""


class StoredPrograms:
    """Compiled programs as files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def key(self, function: Callable[..., Any], *made_from: Any) -> str | None:
        """The name of `function`'s program; None = it cannot be named without tracing it.

        Args:
          made_from: what else decides: its text must say all of it and be the same in every
            process, as that of numbers, strings, dataclasses and shapes is.
        """
        bound: list[Any] = []
        while isinstance(function, partial):
            bound.append((function.args, sorted(function.keywords.items())))
            function = function.func
        known = function.__module__.split(".")[:2]
        traced = ([_PACKAGE.name, part] for part in ("nn", "models", "engine"))
        if known not in traced or function.__closure__ or "<" in function.__qualname__:
            return None
        text = repr((function.__module__, function.__qualname__, bound, made_from))
        if " at 0x" in text:  # the address of an object whose text says nothing
            return None
        return hashlib.sha256((_surroundings() + text).encode()).hexdigest()

    def load(self, key: str, arguments: Any, devices: Sequence[Any]) -> jax.stages.Compiled | None:
        """The program, or None where there is none that can be read.

        Args:
          arguments: the tuple of its arguments, or of their shapes.
          devices: `jax.Device`s on which it runs.
        """
        try:
            data = (self._directory / key).read_bytes()
        except OSError:
            return None
        try:
            digest, body = data[:32], data[32:]
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("the file is torn")
            payload, skeleton = pickle.load(io.BytesIO(body))
            return serialize_executable.deserialize_and_load(
                payload,
                jax.tree.structure((arguments, {})),
                jax.tree.structure(skeleton),
                execution_devices=devices,
            )
        except Exception as error:
            log.warning("a stored program is not used, but compiled anew: %s", error)
            return None

    def save(self, key: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program; where that is not possible, the next start compiles it again."""
        try:
            payload, _, out_tree = serialize_executable.serialize(compiled)
            # A tree of numbers, since a structure itself cannot be written.
            skeleton = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
            body = pickle.dumps((payload, skeleton))
            handle, name = tempfile.mkstemp(dir=self._directory)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(body).digest() + body)
            os.replace(name, self._directory / key)
        except Exception as error:
            log.warning("a program is not kept for the next start: %s", error)


@cache
def _surroundings() -> str:
    """What all programs of this process share: code, versions, settings, machine."""
    code = hashlib.sha256()
    for file in sorted(f for part in _TRACED for f in _PACKAGE.glob(part)):
        code.update(f"{file.relative_to(_PACKAGE)}:{file.stat().st_size};".encode())
        code.update(file.read_bytes())
    plain = (bool, int, float, str, type(None))
    settings = {
        name: value
        for name, value in sorted(jax.config.values.items())
        if isinstance(value, plain) and "cache" not in name and "log" not in name
    }
    devices = [(d.platform, d.device_kind, d.id, d.process_index) for d in jax.devices()]
    client = jax.devices()[0].client
    return repr(
        (
            code.hexdigest(),
            platform.python_version(),
            [module.__version__ for module in (jax, jaxlib, flax)],
            client.platform_version,
            devices,
            _processor() if client.platform == "cpu" else "",
            os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            settings,
        )
    )


def _processor() -> str:
    """Instructions and cores of this machine: programs for a CPU are made for them."""
    text = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                text += line
            elif not line:
                break
    except OSError:
        text = platform.processor()
    return f"{platform.machine()} {os.cpu_count()} {text}"
