"""Moves a corpus to Milvus and says after every batch how far it is, until it is killed.

Usage: migrating.py CORPUS TO BATCH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tte_jax.corpus.store import CorpusStore
from tte_jax.index.migration import migrate


def main() -> None:
    def said(done: int, total: int) -> None:
        print(done, total, flush=True)
        time.sleep(0.5)  # the parent chooses this moment

    migrate(CorpusStore.open(Path(sys.argv[1])), sys.argv[2], progress=said, batch=int(sys.argv[3]))


if __name__ == "__main__":
    main()
