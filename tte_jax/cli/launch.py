"""Starts the five services as one child process, waits until they serve, and stops them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tte_jax import system_state
from tte_jax.builtin import models
from tte_jax.cli import corpus, inspection
from tte_jax.cli.output import Output
from tte_jax.client import Client
from tte_jax.errors import InvalidInputError, PreconditionError, UnavailableError
from tte_jax.sharding import parse_mesh
from tte_jax.weights.hf import QUANTISATIONS

POLL_S = 0.25
# The services' two waves drain one after the other; the supervisor ends what takes longer than its
# grace and this.
WAVES, SPARE_S = 2, 20.0
# What the services' processes end with, see `servers.runtime`.
PORT_IN_USE = 98
# What the supervisor writes before the reason, as its last words.
_CANNOT_START = "The system cannot start:"


@dataclass(frozen=True)
class Started:
    """A system that this process started.

    Attributes:
      process: the supervisor.
      addresses: service → host:port.
      log: what the services write.
    """

    process: subprocess.Popen[bytes]
    addresses: dict[str, str]
    log: Path

    def address(self, service: str) -> str:
        return self.addresses[service]


@contextlib.contextmanager
def services(
    data_dir: Path, *, wait_s: float, out: Output, flags: Sequence[str] = ()
) -> Iterator[Started]:
    """The services while the block runs: all SERVING when it begins, all ended after it.

    Args:
      data_dir: corpus, caches, logs and state; made when missing.
      wait_s: how long they get until all serve. The first start compiles, later ones do not.
      flags: for `python -m servers all`.

    Raises:
      PreconditionError: a system runs on this data directory already, or one ended at its start.
      InvalidInputError: a port is taken.
      UnavailableError: not all serve after `wait_s`.
    """
    if running := system_state.read(data_dir):
        raise PreconditionError(
            f"A system with the data directory {data_dir} is running already (process "
            f"{running.pid}, gateway {running.service('gateway').address}). Use it, stop it, or "
            "give another --data-dir.",
            reason="ALREADY_RUNNING",
        )
    log = data_dir / "services.log"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise InvalidInputError(
            f"--data-dir {data_dir}: {error.strerror or error}; give a folder that can be written"
            " to.",
            field="--data-dir",
        ) from None
    command = [sys.executable, "-m", "servers", "all", f"--data-dir={data_dir}", *flags]
    # A group of its own: Ctrl-C reaches this process alone, which then stops the services in order.
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, f"--parent-pid={os.getpid()}"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with _sigterm_as_interrupt():
            addresses = _wait(process, data_dir, log, wait_s, out)
            yield Started(process, addresses, log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Drains the services; kills them when that takes longer than it can."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_longest_stop())
        except subprocess.TimeoutExpired:
            # The services end with the supervisor, whichever way that ends.
            process.kill()
            process.wait()


def _longest_stop() -> float:
    """Seconds, by the variables that the services read, too."""
    grace = float(os.environ.get("TTE_GRACE_S") or 30.0)
    delay = float(os.environ.get("TTE_DRAIN_DELAY_S") or 0.0)
    return WAVES * (grace + delay + SPARE_S)


def model_versions(started: Started) -> dict[str, str]:
    """Service → version of the model that it runs."""
    return {
        seen.service: str(seen.about["model_version"])
        for seen in inspection.look(started.addresses, timeout_s=10.0)
        if "model_version" in seen.about
    }


def stored(started: Started) -> corpus.Stored:
    """What the index holds."""
    (seen,) = inspection.look({"index": started.address("index")}, timeout_s=10.0)
    return corpus.Stored(
        int(seen.about.get("documents", 0)), str(seen.about.get("embedder_version", ""))
    )


def ensure_corpus(started: Started, client: Client, data_dir: Path, out: Output) -> corpus.Ingested:
    """The built-in corpus in the system's index, see `corpus.ensure`; says what it took."""
    versions = model_versions(started)
    made = corpus.ensure(
        client,
        data_dir=data_dir,
        models={role: versions.get(role, "") for role in ("reasoner", "embedder")},
        stored=stored(started),
        out=out,
    )
    how = "from the last time" if made.cached else f"{made.stored:,} new in {made.seconds:.0f} s"
    out.show(f"Corpus: {made.documents:,} OpenMoji pictures, {how}.")
    return made


def model_flags(given: Sequence[str] | None) -> list[str]:
    """`--models` values as flags of the services; the built-in models where none is given.

    Raises NotFoundError for a model that is not there, InvalidInputError for an unknown role.
    """
    builtin = {
        "reasoner": models.REASONER,
        "embedder": models.EMBEDDER,
        "reranker": models.RERANKER,
    }
    # The services' own variables count too, so that they are checked here as well.
    chosen = {
        role: os.environ.get(f"TTE_{role.upper()}_MODEL") or builtin[role] for role in builtin
    }
    for value in given or ():
        role, separator, directory = value.partition("=")
        if not separator or Path(value).is_dir():
            chosen["reasoner"] = chosen["embedder"] = str(models.resolve(value))
        elif role in chosen:
            chosen[role] = str(models.resolve(directory))
        else:
            raise InvalidInputError(
                f"--models {value!r}: {role!r} is not one of {', '.join(chosen)}.",
                field="--models",
            )
    return [f"--{role}-model={models.resolve(m).absolute()}" for role, m in chosen.items()]


def placement_flags(quantise: str, mesh: str) -> list[str]:
    """`--quantise` and `--mesh` as flags of the services, none where they are empty.

    Raises InvalidInputError for values that no service would take.
    """
    if quantise not in ("", *QUANTISATIONS):
        raise InvalidInputError(
            f"--quantise {quantise!r}: expected {' or '.join(QUANTISATIONS)}, or nothing.",
            field="--quantise",
        )
    parse_mesh(mesh)
    given = {"quantise": quantise, "mesh": mesh}
    return [f"--{name}={value}" for name, value in given.items() if value]


def _wait(
    process: subprocess.Popen[bytes], data_dir: Path, log: Path, wait_s: float, out: Output
) -> dict[str, str]:
    """Service → address once all serve."""
    until = time.monotonic() + wait_s
    waiting: list[str] = list(inspection.SERVICES)
    with out.err.status("Starting the services") as spinner:
        while time.monotonic() < until:
            if process.poll() is not None:
                raise _ended(process.returncode, log)
            running = system_state.read(data_dir)
            if running is not None and running.pid == process.pid:
                if running.ready:
                    return {s.name: s.address for s in running.services}
                waiting = [s.name for s in running.services if s.state != "serving"]
                spinner.update(f"Starting the services (waiting for {', '.join(waiting)})")
            time.sleep(POLL_S)
    raise UnavailableError(
        f"After {wait_s:.0f} s these services do not serve yet: {', '.join(waiting)}. Allow more "
        f"time with --start-timeout; the log is {log}.",
        reason="START_TIMEOUT",
    )


def _ended(code: int, log: Path) -> InvalidInputError | PreconditionError:
    text = log.read_text(errors="replace").strip()
    why = text[max(text.rfind(_CANNOT_START), 0) :].removeprefix(_CANNOT_START).strip()
    if code == PORT_IN_USE:
        return InvalidInputError(f"A port is taken. {why}", field="--port", reason="PORT_IN_USE")
    return PreconditionError(
        f"The services ended at their start with code {code}. {why or 'They said nothing.'}",
        reason="START_FAILED",
    )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM stops the services too: it raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
