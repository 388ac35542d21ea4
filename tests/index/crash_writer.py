"""A process that writes at random and says what was acknowledged, until it is killed.

Usage: crash_writer.py CORPUS SEED. Prints one JSON line before each write ("try") and one after
its acknowledgement ("ack"). Snapshots and rebuilds run all the time beside it.
"""

from __future__ import annotations

import json
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


def main() -> None:
    index = CorpusIndex.open(sys.argv[1], config=IndexConfig(delta_rows=8), snapshot_every=11)
    choose = random.Random(int(sys.argv[2]))

    def disturb() -> None:
        while True:
            index.snapshot()
            try:
                index.rebuild()
            except PreconditionError as exc:
                assert exc.reason == "REBUILD_RUNNING"

    threading.Thread(target=disturb, daemon=True).start()
    while True:
        ids = [f"d{choose.randrange(30)}" for _ in range(choose.randint(1, 6))]
        if choose.random() < 0.65:
            version = choose.randrange(10**9)
            say("try", {"upsert": ids, "version": version})
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
            say("try", {"delete": ids})
            index.delete(ids)
        say("ack", {})


def say(what: str, operation: dict) -> None:
    # One write of one line: what the parent reads is whole even if the kill comes next.
    sys.stdout.write(json.dumps({"say": what, **operation}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
