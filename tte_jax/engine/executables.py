"""The ahead-of-time table: every program of a process, compiled before the first request.

Serving calls only what is in the table. A shape that is not in it is an error at once, never a
compilation of half a minute in the middle of a request; `backend_compiles` counts what the whole
process compiled and is how tests and operators check that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from tte_jax.engine.layout import ONE_DEVICE, Layout
from tte_jax.engine.stored import StoredPrograms
from tte_jax.errors import InternalError, PreconditionError, UnavailableError
from tte_jax.models.multimodal import MultimodalLM

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called as (done, total, name of the program just compiled), from any thread."""

# One XLA compilation takes about one core; tracing holds the interpreter lock. More threads than
# two gained nothing on small models and doubled the peak memory on large ones.
COMPILE_THREADS = 2

CACHED_BYTES = 64 * 2**20
FEW_TOKENS = 256
"""Up to so many tokens, copying weights out of their stacks is a large part of a program where they
come from memory: of 114 M parameters, 8 steps of one sequence take 596 ms stacked and 281 ms apart,
of four 1,107 and 713 (two busy cores). Models of up to `CACHED_BYTES` gain a fifth for one sequence
and nothing beyond."""


TURNED_TOKENS = 32
TURNED_BYTES = 2 * 2**30
"""Up to so many tokens, weights that lie with their outputs first (`TurnedWeight`) are read faster.
They are a second copy of the decoder, so not of models beyond these bytes."""


class _CompileCounter:
    """Counts XLA compilations of this process, those answered by the persistent cache included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()
        self.count = 0
        self.cache_hits = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self.count += 1

    def loaded(self) -> None:
        """A program came from `StoredPrograms`, of which JAX knows nothing."""
        with self._lock:
            self.count += 1
            self.cache_hits += 1

    def _on_event(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._mine.hits = self.hits_here + 1
            with self._lock:
                self.cache_hits += 1

    @property
    def hits_here(self) -> int:
        """Compilations of the calling thread that JAX's cache answered."""
        return getattr(self._mine, "hits", 0)


_counter = _CompileCounter()
_stored: StoredPrograms | None = None


def backend_compiles() -> int:
    """XLA compilations in this process since `tte_jax.engine.executables` was imported."""
    return _counter.count


def compile_cache_hits() -> int:
    """How many of `backend_compiles` were read from the disk."""
    return _counter.cache_hits


def enable_compile_cache(directory: str | Path) -> Path:
    """Keeps compiled programs on disk; call before anything is compiled.

    The files are executable code: the directory is made for its owner alone (0700), and one that
    others can write to is refused.

    Raises:
      PreconditionError: the directory cannot be made, or is writable by group or others.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PreconditionError(
            f"compile cache {path}: cannot be created ({error.strerror}); "
            "name a directory that this user can write"
        ) from error
    if os.name == "posix" and path.stat().st_mode & 0o022:
        raise PreconditionError(
            f"compile cache {path}: others can write there, and its files are executed; "
            f"run `chmod go-w {path}` or name another directory"
        )
    global _stored
    _stored = StoredPrograms(path / "programs")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return path


@dataclass(frozen=True)
class _Parameters:
    """A model as flat leaves, and the way back; `text` says of what kind it is."""

    leaves: tuple[jax.Array, ...]
    model: Callable[[tuple[Any, ...]], MultimodalLM]
    text: str

    @classmethod
    def of(cls, model: MultimodalLM) -> _Parameters:
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        return cls(
            tuple(leaves),
            lambda flat: nnx.merge(graph, jax.tree.unflatten(tree, list(flat))),
            f"{model.config} {tree}",
        )


@dataclass(frozen=True)
class _Program:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    parameters: _Parameters


class ExecutableTable:
    """Programs over one model, compiled per key.

    Attributes:
      layout: where arguments lie; parameters lie as they were loaded.

    Parameters are passed as flat leaves: handing a module of hundreds of variables to an
    executable costs more host time than a decode step of a small model takes. On a CPU, programs of
    few tokens get each layer's weights apart, see `models.stack`.
    """

    def __init__(self, model: MultimodalLM, layout: Layout = ONE_DEVICE) -> None:
        self.layout = layout
        self._model = model
        self._stacked = _Parameters.of(model)
        self._few_tokens = self._turned_tokens = 0
        if layout.mesh is None and jax.default_backend() == "cpu":
            size = sum(x.nbytes for x in self._stacked.leaves)
            self._few_tokens = FEW_TOKENS if size > CACHED_BYTES else 1
            self._turned_tokens = TURNED_TOKENS if size <= TURNED_BYTES else 0
        self._programs: dict[tuple[str, Hashable], _Program] = {}
        self._table: dict[tuple[str, Hashable], jax.stages.Compiled] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._cancelled = threading.Event()
        self.warmup_s = 0.0

    def __len__(self) -> int:
        """How many executables are compiled."""
        return len(self._table)

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    def add(
        self,
        name: str,
        key: Hashable,
        function: Callable[..., Any],
        *arguments: Any,
        donate: tuple[int, ...] = (),
        tokens: int,
    ) -> None:
        """Declares `function(model, *arguments)`.

        Args:
          tokens: that a run computes (or patches), padding included; 0 = it uses no weights.
          arguments: pytrees of `jax.ShapeDtypeStruct`, made by `layout`.
          donate: which of `arguments` (from 0) the program may overwrite.
        """
        of = self._stacked
        if 0 < tokens <= self._turned_tokens:
            of = self._turned
        elif 0 < tokens <= self._few_tokens:
            of = self._apart
        self._programs[name, key] = _Program(function, arguments, donate, of)

    @cached_property
    def _apart(self) -> _Parameters:
        return _Parameters.of(self._model.apart())

    @cached_property
    def _turned(self) -> _Parameters:
        return _Parameters.of(self._model.apart(turned=True))

    def cancel(self) -> None:
        """Ends a running warm-up after the programs that compile at this moment."""
        self._cancelled.set()

    def warmup(self, progress: Progress | None = None) -> None:
        """Compiles what is declared and not yet compiled. Idempotent and thread-safe.

        Raises:
          UnavailableError: `cancel` was called.
        """
        with self._lock:
            missing = [key for key in self._programs if key not in self._table]
            if not missing:
                self._ready.set()
                return
            start = time.monotonic()
            with ThreadPoolExecutor(COMPILE_THREADS, "compile") as pool:
                jobs = {pool.submit(self._compile, self._programs[key]): key for key in missing}
                for done, job in enumerate(as_completed(jobs), start=1):
                    if self._cancelled.is_set():
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise UnavailableError("the model is shutting down")
                    name, key = jobs[job]
                    self._table[name, key] = job.result()
                    if progress is not None:
                        progress(done, len(missing), f"{name}{_shape_text(key)}")
            self.warmup_s += time.monotonic() - start
            self._ready.set()

    def run(self, name: str, key: Hashable, *arguments: Any) -> Any:
        """Runs a compiled program.

        Raises:
          InternalError: no such program was compiled.
          TypeError: the arguments' shapes or dtypes are not those it was compiled for.
        """
        try:
            compiled = self._table[name, key]
        except KeyError:
            raise InternalError(
                f"no executable {name}{_shape_text(key)}: it was not compiled at warm-up"
            ) from None
        program = self._programs[name, key]
        placed = self.layout.put(arguments, program.arguments)
        return compiled(program.parameters.leaves, *placed)

    def _compile(self, program: _Program) -> jax.stages.Compiled:
        def call(flat: tuple[Any, ...], *arguments: Any) -> Any:
            return program.function(program.parameters.model(flat), *arguments)

        call.__name__ = getattr(program.function, "__name__", "program")
        donate = tuple(i + 1 for i in program.donate)
        shapes = tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for x in program.parameters.leaves
        )
        arguments = (shapes, *program.arguments)
        stored, key = _stored, None
        if stored is not None:
            made_from = program.parameters.text, arguments, donate, self.layout.text
            key = stored.key(program.function, *made_from)
        if stored is not None and key is not None:
            kept = stored.load(key, arguments, self.layout.devices)
            if kept is not None:
                _counter.loaded()
                # Told where JAX tells of its own compilations, and as loud.
                told = jax.config.values.get("jax_log_compiles")
                log.log(
                    logging.WARNING if told else logging.DEBUG,
                    "Read a stored program: %s",
                    call.__name__,
                )
                return kept
        hits = _counter.hits_here
        with self.layout.tracing():  # of this thread alone
            lowered = jax.jit(call, donate_argnums=donate).lower(*arguments)
        compiled = lowered.compile()
        # What was read from JAX's cache lacks its code when it is written again.
        if stored is not None and key is not None and hits == _counter.hits_here:
            stored.save(key, compiled)
        return compiled


def _shape_text(key: Hashable) -> str:
    parts = key if isinstance(key, tuple) else (key,)
    return "[" + ",".join(str(p) for p in parts) + "]"
