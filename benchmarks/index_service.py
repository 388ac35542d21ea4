"""The index service with a second way in: a line of JSON on its standard input sets the effort of
the searcher, or measures searches in this very process, beside the same threads.

    python -m benchmarks.index_service --port 50064 --data-dir DIR

Commands: {"value": V} sets the effort of `scaled`; {"measure": {…}} calls
`index_corpus.in_process`. Each is answered by one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from benchmarks import index_corpus
from servers import index, runtime
from servers.settings import Settings, parse
from tte_jax.index import CorpusIndex
from tte_jax.index.scann_searcher import Effort


def answer(corpus: CorpusIndex, chosen: list[Any], command: dict[str, Any]) -> Any:
    """Carries out one command; `chosen` keeps the searcher's own effort between them."""
    searcher: Any = corpus.vectors.live.view.generation.searcher  # type: ignore[attr-defined]
    if "measure" in command:
        return index_corpus.in_process(corpus, **command["measure"])
    if searcher is None:
        return []
    if not chosen:
        chosen.append(searcher.effort)
    searcher.effort = scaled(searcher, chosen[0], command["value"])
    return list(searcher.effort)


def scaled(searcher: Any, chosen: Any, value: int) -> Any:
    """The `Effort` that costs about 2 ** (value / 2) of the one that a searcher chose."""
    leaves, reorder = chosen
    share = 2 ** (value / 2)
    if leaves:
        most = max(effort.leaves for effort in searcher.efforts)
        return Effort(min(most, max(1, round(leaves * share))), reorder)
    return Effort(leaves, max(20, round(reorder * share)))


async def create(settings: Settings) -> runtime.Service:
    servicer = index.IndexServicer(settings.data_dir / index.CORPUS)

    def listen() -> None:
        chosen: list[Any] = []
        for line in sys.stdin:
            opened = servicer._opened
            assert opened is not None, "commands come after the start"
            print(json.dumps(answer(opened.index, chosen, json.loads(line))), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    return index.service_of(servicer)


if __name__ == "__main__":
    sys.exit(runtime.run(parse(["index", *sys.argv[1:]]), create))
