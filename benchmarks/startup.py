"""Seconds from `tte serve` to the first answer: a first start, with nothing on disk, and a second.

    python -m benchmarks.startup

Runs the real command as a child, twice, in a fresh data directory, and stops it in between. A first
start compiles every program and ingests the built-in corpus; a second finds both done.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import environment
from tte_jax import system_state
from tte_jax.builtin import openmoji
from tte_jax.cascade.messages import IngestOptions, SearchQuery
from tte_jax.cli import launch
from tte_jax.client import Client
from tte_jax.content import Content, Document
from tte_jax.errors import PreconditionError, UnavailableError

POLL_S = 0.05
QUESTION = "a smiling cat"


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      documents: 0 = the whole built-in corpus, as `tte serve` ingests it; else only its first so
        many pictures, for a quick look.
      models: role=DIR, as `tte serve --models`; empty = the built-in models.
      data_dir: must not exist; empty = a temporary one, removed afterwards.
      timeout: seconds that a start and its ingest get.
      out: the result.
    """

    documents: int = 0
    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    data_dir: str = ""
    timeout: float = 3600.0
    out: Path = Path("benchmarks/results/startup.json")


def start_once(config: Config, folder: Path) -> dict[str, Any]:
    """One start and stop of `tte serve`.

    Returns seconds since the command was given until all services were SERVING (`serving_s`), the
    corpus was there (`corpus_s`) and the first query had its final ranking (`first_answer_s`), and
    what that query alone took.
    """
    command = [sys.executable, "-m", "tte_jax.cli.app", "serve", "--port=0", "--json",
               f"--data-dir={folder}", f"--start-timeout={config.timeout}",
               *(f"--models={m}" for m in config.models),
               *(["--no-corpus"] if config.documents else [])]  # fmt: skip
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stdin=subprocess.DEVNULL)
        try:
            gateway = _until_serving(process, folder, config.timeout)
            figures = {"serving_s": time.perf_counter() - began}
            with Client(gateway) as client:
                if config.documents:
                    _ingest(client, config.documents)
                else:
                    _until_announced(process, Path(said.name), config.timeout)
                figures["corpus_s"] = time.perf_counter() - began
                asked = time.perf_counter()
                last = client.search_final(SearchQuery(Content.of(QUESTION), deadline_s=60.0))
                figures["first_answer_s"] = time.perf_counter() - began
                figures["first_query_s"] = time.perf_counter() - asked
        finally:
            _stop(process)
    if not last.results or last.degraded:
        raise PreconditionError(f"the first answer was not whole: {last.degraded or 'no results'}")
    return {name: round(value, 2) for name, value in figures.items()}


def main(config: Config) -> int:
    load = environment.foreign_load()
    about = environment.describe("benchmarks.startup")
    with _fresh_folder(config.data_dir) as folder:
        starts: dict[str, dict[str, Any]] = {}
        for name in ("first", "second"):
            starts[name] = start_once(config, folder)
            print(f"{name} start: {starts[name]}", flush=True)
        cache = folder / "compile-cache"
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    result = about | {
        "noisy": environment.noisy(load),
        "foreign_load": {"before": load},
        "documents": config.documents or len(openmoji.entries()),
        "compile_cache_mb": round(size / 1e6, 1),
        **starts,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {config.out}{' (noisy: other work ran beside it)' if result['noisy'] else ''}.")
    return 0


@contextlib.contextmanager
def _fresh_folder(given: str) -> Iterator[Path]:
    """A data directory that holds nothing. Raises PreconditionError when `given` exists."""
    if not given:
        with tempfile.TemporaryDirectory(prefix="tte-startup-") as made:
            yield Path(made)
        return
    folder = Path(given).absolute()
    if folder.exists():
        raise PreconditionError(f"{folder} exists; a first start needs a new data directory")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _until_serving(process: subprocess.Popen[bytes], folder: Path, timeout_s: float) -> str:
    """Address of the gateway once all services serve."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        _check_alive(process)
        running = system_state.read(folder)
        if running is not None and running.ready:
            return running.service("gateway").address
        time.sleep(POLL_S)
    raise UnavailableError(f"the services did not serve within {timeout_s:.0f} s")


def _until_announced(process: subprocess.Popen[bytes], said: Path, timeout_s: float) -> None:
    """Returns when `tte serve` has written its JSON document, which it does last of all."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        _check_alive(process)
        with contextlib.suppress(ValueError):  # nothing yet, or half of it
            json.loads(said.read_text())
            return
        time.sleep(POLL_S)
    raise UnavailableError(f"the corpus was not ingested within {timeout_s:.0f} s")


def _ingest(client: Client, count: int) -> None:
    documents: Iterator[Document] = islice(openmoji.documents(), count)
    for update in client.ingest(documents, IngestOptions()):
        if update.failed:
            raise PreconditionError(f"{update.failed} documents could not be ingested")


def _check_alive(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        raise PreconditionError(f"`tte serve` ended with exit code {process.returncode}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait(launch.STOP_S)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
