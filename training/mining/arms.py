"""The same training set with the negatives of every arm, for comparing arms.

One mining by the reranker is enough: its round holds what the filter dropped as well, and the
candidates it was mined from are those of the embedder's arm. Every arm comes from a sealed round.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from training.data.rows import ExampleSource
from training.mining import miner
from training.mining.mined_source import MinedSource
from training.mining.records import EMBEDDER, NONE, RANDOM, RERANKER, UNFILTERED, Rules
from training.mining.rounds import Round, RoundWriter, sealed
from training.mining.table import Table

IN_ORDER = (NONE, RANDOM, EMBEDDER, UNFILTERED, RERANKER)
"""As the method orders them by what they are worth, least first."""


async def sources(
    source: ExampleSource,
    table: Table,
    found: np.ndarray,
    cosines: np.ndarray,
    mined: Round,
    folder: Path,
) -> dict[str, ExampleSource]:
    """The source of each arm of `IN_ORDER`.

    Args:
      source: the data; table: of them; found, cosines: of `candidates.nearest`.
      mined: of the arm "reranker" over these.
      folder: for the rounds of the arms that need no reranker.

    Raises:
      InvalidInputError: `mined` is of other data.
    """
    made: dict[str, ExampleSource] = {NONE: source}
    rules = Rules(**mined.manifest["rules"])
    for arm in (RANDOM, EMBEDDER):
        plain = await _plain(table, found, cosines, replace(rules, arm=arm), folder / arm, mined)
        made[arm] = MinedSource(source, plain, table)
    made[UNFILTERED] = MinedSource(source, mined, table, filtered=False)
    made[RERANKER] = MinedSource(source, mined, table)
    return made


async def _plain(
    table: Table,
    found: np.ndarray,
    cosines: np.ndarray,
    rules: Rules,
    folder: Path,
    mined: Round,
) -> Round:
    if not sealed(folder):
        version = mined.manifest["models"]["embedder"]
        with RoundWriter(folder, 0, miner.header(table, rules, embedder=version)) as writer:
            await miner.mine(table, found, cosines, rules, writer)
            writer.seal()
    return Round(folder / "round-00000")
