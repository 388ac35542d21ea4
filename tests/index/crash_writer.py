"""A process that writes at random and says what was acknowledged, until it is killed.

Usage: crash_writer.py CORPUS SEED. Two threads write, each its own documents: each prints a JSON
line before a write ("try") and one after its acknowledgement ("ack"). A third searches and prints a
line when it sees a document that is deleted ("problem"). Snapshots and rebuilds run beside.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading

import numpy as np

from tests.index.documents import make_entry
from tte_jax.errors import PreconditionError
from tte_jax.index import CorpusIndex, IndexConfig


def vector_of(version: int) -> np.ndarray:
    vector = np.random.default_rng(version).standard_normal(6).astype(np.float32)
    return vector / np.linalg.norm(vector)


def image_of(version: int) -> bytes:
    return b"image %d " % (version % 7) * 50


WRITERS = "ab"


def main() -> None:
    index = CorpusIndex.open(
        sys.argv[1], config=IndexConfig(delta_rows=8, check_every=50), snapshot_every=11
    )
    seed = int(sys.argv[2])
    # Deleted for certain: from the acknowledgement until somebody tries to write it again.
    gone: set[str] = set()

    def disturb() -> None:
        while True:
            index.snapshot()
            try:
                index.rebuild()
            except PreconditionError as exc:
                assert exc.reason == "REBUILD_RUNNING"

    def search() -> None:
        choose = random.Random(seed + 1)
        while True:
            before = set(gone)
            hits = index.search(vector_of(choose.randrange(100)), 20)
            if risen := {hit.id for hit in hits} & before & set(gone):
                say("problem", "s", {"deleted but found": sorted(risen)})

    def write(name: str) -> None:
        choose = random.Random(f"{seed}{name}")
        while True:
            ids = [f"{name}{choose.randrange(20)}" for _ in range(choose.randint(1, 6))]
            if choose.random() < 0.65:
                version = choose.randrange(10**9)
                say("try", name, {"upsert": ids, "version": version})
                gone.difference_update(ids)
                index.upsert(
                    [
                        make_entry(
                            id,
                            vector_of(version),
                            image=image_of(version),
                            metadata={"version": version},
                        )
                        for id in ids
                    ]
                )
            else:
                say("try", name, {"delete": ids})
                index.delete(ids)
                gone.update(ids)
            say("ack", name, {})

    def guarded(work, *arguments) -> None:
        try:
            work(*arguments)
        except BaseException as exc:
            say("problem", "", {"error": repr(exc)})

    threads = [
        threading.Thread(target=guarded, args=task, daemon=True)
        for task in ((disturb,), (search,), *((write, name) for name in WRITERS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def say(what: str, who: str, operation: dict) -> None:
    # One write of one line: what the parent reads is whole even if the kill comes next.
    os.write(1, (json.dumps({"say": what, "who": who, **operation}) + "\n").encode())


if __name__ == "__main__":
    main()
