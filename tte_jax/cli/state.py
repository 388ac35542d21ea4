"""Where the system of this machine keeps its data, and where its services listen."""

from __future__ import annotations

from pathlib import Path

from tte_jax import system_state

# What `servers` uses when no port is given.
USUAL_ADDRESSES = {
    "gateway": "127.0.0.1:50060",
    "reasoner": "127.0.0.1:50061",
    "embedder": "127.0.0.1:50062",
    "reranker": "127.0.0.1:50063",
    "index": "127.0.0.1:50064",
}


def data_dir(given: Path | None = None) -> Path:
    """The data directory to use: as given, else ~/.local/share/tte."""
    return (given or Path("~/.local/share/tte")).expanduser().absolute()


def running_addresses(folder: Path) -> dict[str, str]:
    """Service → host:port of the system that runs with the data directory `folder`; empty when
    none does."""
    running = system_state.read(folder)
    return {s.name: s.address for s in running.services} if running else {}
