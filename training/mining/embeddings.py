"""Vectors of a training set, in files that are whole or not there.

A chunk of queries or documents is embedded request by request, one at a time, and written when it
is complete. A restart goes on with the first chunk that is missing. Requests are cut at fixed
places, so that the engine forms the same batches again and a restarted run gets the same bits.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training.data.examples import Document
from training.data.rows import ExampleSource
from training.mining.table import Table
from tte_jax.content import Side
from tte_jax.corpus.durable import write_atomically
from tte_jax.errors import DataLossError, OverloadedError, PreconditionError, UnavailableError
from tte_jax.limits import MAX_BATCH_ITEMS
from tte_jax.stages import EmbedderStage, EmbedItem

CHUNK = 1024
VERSION_FILE = "version.txt"


async def embed(
    table: Table,
    source: ExampleSource,
    stage: EmbedderStage,
    folder: Path,
    *,
    batch: int = MAX_BATCH_ITEMS,
    chunk: int = CHUNK,
    patience_s: float = 120.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Embeds what is not embedded yet.

    Args:
      folder: of this retriever's vectors; made when missing.
      batch: items of one request.
      chunk: items of one file.
      patience_s: how long a service that is away is waited for.

    Returns:
      ([Q, D] float32 of the queries, [N, D] of the documents, the embedder's version).

    Raises:
      PreconditionError: the folder holds another embedder's vectors, or it changed half way.
      As the stage and the source.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def query(i: int) -> tuple[Document, Side]:
        return source[i].query, Side.QUERY

    def document(i: int) -> tuple[Document, Side]:
        return table.document(source, i), Side.DOCUMENT

    total = len(table.queries) + len(table.documents)
    done = 0
    whole: list[np.ndarray] = []
    for name, count, read in (
        ("queries", len(table.queries), query), ("documents", len(table.documents), document),
    ):  # fmt: skip
        parts: list[np.ndarray] = []
        for start in range(0, count, chunk):
            end = min(start + chunk, count)
            path = folder / f"{name}-{start:09d}.npy"
            if not path.exists():
                vectors = []
                for first in range(start, end, batch):
                    items = [_item(*read(i)) for i in range(first, min(first + batch, end))]
                    vectors.append(await _request(stage, items, folder, patience_s))
                    progress(done + first + len(items) - start, total)
                write_atomically(path, _npy(np.concatenate(vectors)))
            parts.append(_read(path, end - start))
            done += end - start
        whole.append(np.concatenate(parts))
    return whole[0], whole[1], (folder / VERSION_FILE).read_text()


async def _request(
    stage: EmbedderStage, items: Sequence[EmbedItem], folder: Path, patience_s: float
) -> np.ndarray:
    waited = 0.0
    while True:
        try:
            vectors, usage = await stage.embed(items)
            break
        except (UnavailableError, OverloadedError) as error:
            if waited >= patience_s:
                raise
            await asyncio.sleep(error.retry_after_s)
            waited += error.retry_after_s
    path = folder / VERSION_FILE
    if not path.exists():
        write_atomically(path, usage.model_version.encode())
    if path.read_text() != usage.model_version:
        raise PreconditionError(
            f"{folder} holds vectors of {path.read_text()}, and {usage.model_version} answers. "
            "Start that embedder again, or delete the folder.",
            reason="EMBEDDER_MISMATCH",
        )
    return vectors.astype(np.float32)


def _item(document: Document, side: Side) -> EmbedItem:
    return EmbedItem(document.content, side, document.ecr, document.instruction)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _read(path: Path, rows: int) -> np.ndarray:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataLossError(f"{path} cannot be read ({error}). Delete it.", path=path) from error
    if len(vectors) != rows:
        raise DataLossError(
            f"{path} holds {len(vectors)} vectors, expected {rows}. Delete its folder.", path=path
        )
    return vectors
