"""Starts loops and rerankers by forking, so that a start costs no imports.

A line on stdin is a JSON object: `{"run": "loop", "state", "data", "reranker", "rounds"}` or
`{"run": "reranker", "port"}` is answered with the process's id, `{"wait": id}` with its exit code
(−9 for a killed one). Everything ends with the first process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX  # noqa: F401  (before the forks, as what follows)

import servers.reranker  # noqa: F401
from tests.training.mining import hand
from training import loop
from training.data.jsonl import JsonlSource
from training.mining import table
from training.mining.mined_source import MinedSource
from training.mining.records import Rules
from training.mining.rounds import Round
from training.mining.workspace import Workspace

# Long enough for kills to land in every part of a run of a few seconds.
EMBED_S, RERANK_S, STEP_S = 0.04, 0.01, 0.03
NEGATIVES = 3


def run_loop(state: Path, data: Path, reranker: str, rounds: int) -> None:
    """A whole loop over the models of `hand`."""
    source = JsonlSource(data)
    first = state.parent / "first"
    config = loop.Config(
        data=f"jsonl:{data}",
        state=state,
        rounds=rounds,
        model=str(first),
        reranker=reranker,
        export="",
        rules=Rules(negatives=NEGATIVES, percent_of_positive=0.95, depth=10),
        part_records=8,
        embed_batch=4,
        embed_chunk=8,
        window=3,
        patience_s=120.0,
    )

    def train(asked: loop.Training) -> None:
        made = table.load(Workspace(state).table_path)
        mined = MinedSource(source, Round(asked.negatives), made)

        def counts(document: Any) -> np.ndarray:
            return hand.letter_counts(document.content.text)

        rows = [
            (
                counts(one.query),
                counts(one.positives[0]),
                np.stack([counts(d) for d in one.negatives]),
            )
            for one in (mined[i] for i in range(len(mined)))
            if one.negatives
        ]
        hand.train(rows, asked.model, asked.out, delay_s=STEP_S)

    asyncio.run(loop.run(config, source=source, train=train, open_embedder=hand.opener(EMBED_S)))


def run_reranker(port: int) -> None:
    async def serve() -> None:
        async with hand.reranker_service(hand.HandReranker(RERANK_S), port):
            await asyncio.Event().wait()

    asyncio.run(serve())


def main() -> None:
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        what = asked.pop("run")
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        code = 1
        try:
            os.close(0)
            if what == "loop":
                run_loop(
                    Path(asked["state"]), Path(asked["data"]), asked["reranker"], asked["rounds"]
                )
            else:
                run_reranker(asked["port"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


if __name__ == "__main__":
    main()
