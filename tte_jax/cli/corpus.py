"""Ingests the built-in corpus through the gateway, once; resumes where it was interrupted."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tte_jax import limits
from tte_jax.builtin import openmoji
from tte_jax.cascade.messages import IngestOptions, ItemState
from tte_jax.cli.connection import Client
from tte_jax.cli.output import Output
from tte_jax.cli.progress import bar
from tte_jax.errors import DataLossError

_MARKER = "openmoji.json"


@dataclass(frozen=True)
class Made:
    """What a finished ingest was made of; another ingest is due when any of it changes.

    Attributes:
      openmoji: release of the drawings.
      documents: how many there are.
      models: versions of the reasoner and the embedder.
    """

    openmoji: str
    documents: int
    models: dict[str, str]


@dataclass(frozen=True)
class Stored:
    """What the index holds before the ingest: how many documents, made by which embedder."""

    documents: int
    embedder_version: str


@dataclass(frozen=True)
class Ingested:
    """How the corpus came to be there.

    Attributes:
      documents: documents of the built-in corpus.
      cached: whether it was there already, as a whole.
      stored: documents ingested now; the others were found unchanged.
      seconds: what it took.
    """

    documents: int
    cached: bool
    stored: int
    seconds: float


def check() -> None:
    """Raises PreconditionError when a package that the corpus is made from is missing."""
    next(openmoji.documents())


def ensure(
    client: Client, *, data_dir: Path, models: dict[str, str], stored: Stored, out: Output
) -> Ingested:
    """Makes sure that the whole built-in corpus is in the index.

    Vectors of another embedder cannot be compared with queries, so the built-in documents (and no
    others) are deleted first when the embedder has changed.

    Args:
      client: the gateway.
      data_dir: where the note of a finished ingest lies, beside the corpus that it speaks of.
      models: versions of the running reasoner and embedder.
      stored: what the index holds.

    Raises DataLossError when documents of the built-in corpus could not be stored,
    PreconditionError when the user's own documents were made by another embedder, and what the
    gateway raises when a stage stays away; what was acknowledged until then is kept.
    """
    entries = openmoji.entries()
    made = Made(openmoji=openmoji.version(), documents=len(entries), models=models)
    marker = data_dir / _MARKER
    if _read(marker) == made and stored.documents >= len(entries):
        return Ingested(len(entries), cached=True, stored=0, seconds=0.0)
    started = time.monotonic()
    if stored.documents and stored.embedder_version != models["embedder"]:
        out.note(f"The corpus was made by {stored.embedder_version}; it is made again.")
        ids = [entry.id for entry in entries]
        for start in range(0, len(ids), limits.MAX_DELETE_IDS):
            client.delete_documents(ids[start : start + limits.MAX_DELETE_IDS])
    new = 0
    failed: list[str] = []
    with bar(f"Ingesting {len(entries):,} pictures", len(entries), out) as advance:
        for update in client.ingest(openmoji.documents(), IngestOptions()):
            new = update.stored
            advance(update.stored + update.skipped + update.failed)
            for result in update.results:
                if result.state is ItemState.FAILED:
                    why = result.error.message if result.error else "unknown"
                    failed.append(f"{result.id}: {why}")
    if failed:
        raise DataLossError(
            f"{len(failed)} of {len(entries)} pictures of the built-in corpus were not stored; "
            f"the first: {failed[0]}",
            reason="INGEST_INCOMPLETE",
        )
    _write(marker, made)
    return Ingested(len(entries), cached=False, stored=new, seconds=time.monotonic() - started)


def _read(marker: Path) -> Made | None:
    try:
        return Made(**json.loads(marker.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # no note, or none that can be understood: everything is sent again


def _write(marker: Path, made: Made) -> None:
    marker.parent.mkdir(parents=True, exist_ok=True)
    draft = marker.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(made), indent=2))
    os.replace(draft, marker)
