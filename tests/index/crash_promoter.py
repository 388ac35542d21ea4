"""A process that changes a corpus over to embedder after embedder, until it is killed.

Usage: crash_promoter.py CORPUS. One thread stages the vectors of the next embedder and promotes
them, over and over, going on with what a killed process had staged; one writes with the present
embedder meanwhile; one searches. A JSON line is printed before and after what must last.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from tests.index.crash_writer import say
from tests.index.documents import make_entry
from tte_jax.content import Metadata
from tte_jax.errors import PreconditionError
from tte_jax.index import CorpusIndex, IndexConfig
from tte_jax.stages import IndexEntry, StagedVector

IDS = tuple(f"d{i:02d}" for i in range(30))
# Why a vector of the embedder that served a moment ago is refused.
OTHERS = ("EMBEDDER_MISMATCH", "DIMENSION_MISMATCH")


def name_of(step: int) -> str:
    return f"e{step}"


def edition_of(metadata: Metadata) -> int:
    edition = metadata["edition"]
    assert isinstance(edition, int)
    return edition


def step_of(embedder_version: str) -> int:
    return int(embedder_version[1:])


def vector_of(id: str, edition: int, step: int) -> np.ndarray:
    """What embedder `step` makes of a document; the next one has another dimension."""
    rng = np.random.default_rng([int(id[1:]), edition, step])
    vector = rng.standard_normal(6 + step % 3).astype(np.float32)
    return vector / np.linalg.norm(vector)


def entry_of(id: str, edition: int, step: int) -> IndexEntry:
    metadata = {"edition": edition}
    vector = vector_of(id, edition, step)
    return make_entry(id, vector, metadata=metadata, embedder=name_of(step))


def main() -> None:
    index = CorpusIndex.open(sys.argv[1], config=IndexConfig(delta_rows=8), snapshot_every=7)
    if not index.stats().documents:
        index.upsert([entry_of(id, 0, 1) for id in IDS])
    say("start", "", {})

    def stage(step: int) -> None:
        while some := index.staging.pending(7):
            vectors = [
                StagedVector(id, row.sequence, vector_of(id, edition_of(row.metadata), step))
                for id, row in index.store.documents(some).items()
            ]
            index.staging.put(name_of(step), vectors)

    def promote() -> None:
        while True:
            step = step_of(index.stats().embedder_version) + 1
            index.staging.begin(name_of(step))
            say("try", "promoter", {"step": step})
            while True:
                stage(step)
                try:
                    index.promote(name_of(step))
                    break
                except PreconditionError as exc:
                    if exc.reason != "REEMBEDDING_INCOMPLETE":  # written to meanwhile
                        raise
            say("ack", "promoter", {"step": step})

    def write() -> None:
        edition = 0
        while True:
            edition += 1
            step = step_of(index.stats().embedder_version)
            try:
                index.upsert([entry_of(IDS[edition % len(IDS)], edition, step)])
            except PreconditionError as exc:
                if exc.reason not in OTHERS:  # changed over since it was asked
                    raise
            time.sleep(0.02)

    def search() -> None:
        while True:
            step = step_of(index.stats().embedder_version)
            try:
                hits = index.search(
                    vector_of(IDS[0], 0, step), len(IDS), embedder_version=name_of(step)
                )
            except PreconditionError as exc:
                if exc.reason not in OTHERS:
                    raise
                continue
            if len(hits) != len(IDS):
                say("problem", "", {"found": [hit.id for hit in hits]})

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            say("problem", "", {"error": repr(exc)})

    threads = [
        threading.Thread(target=guarded, args=(work,), daemon=True)
        for work in (promote, write, search)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
