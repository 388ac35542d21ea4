"""The index of one task: all candidates, exactly searched, a query's own pool at a time.

Scores are float32 dot products of normalised vectors. Equal scores are ordered by id: the right
candidate stands first in many of the benchmark's lists, so that their order must not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tte_jax.content import Content, Document, Usage
from tte_jax.filters import Filter
from tte_jax.stages import Hit, IndexEntry

TIES = "equal scores are ordered by candidate id"


class PoolIndex:
    """`IndexStage` over the candidates of a task, in memory.

    Args:
      keep_media: keep images and videos for rewriting (QAR); otherwise only texts are kept.
    """

    def __init__(self, *, keep_media: bool = False) -> None:
        self.keep_media = keep_media
        self.documents: dict[str, Document] = {}
        self._rows: dict[str, int] = {}
        self._vectors: list[np.ndarray] = []
        # All candidates by id, once the first query asks.
        self._table: np.ndarray | None = None
        self._all: list[str] = []
        self._places: dict[str, int] = {}

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        del timeout_s
        for entry in entries:
            document = entry.document
            if not self.keep_media:
                text = document.content.text
                document = replace(document, content=Content.of(text))
            self._rows[document.id] = len(self._vectors)
            self._vectors.append(np.asarray(entry.vector, np.float32))
            self.documents[document.id] = document
        self._table = None
        return len(self._vectors)

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        raise NotImplementedError("candidates of a task are not deleted")

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        del timeout_s
        return [self.documents.get(id) for id in ids]

    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        del embedder_version
        return await self.view(None).search(vector, k=k, filter=filter, timeout_s=timeout_s)

    def view(self, pool: Sequence[str] | None, order: Sequence[str] | None = None) -> PoolView:
        """The candidates of one query.

        Args:
          pool: their names; None = all. Names that were not stored are left out.
          order: a ranking made elsewhere, which takes the place of the first stage's.
        """
        if self._table is None:
            self._all = sorted(self._rows)
            rows = [self._vectors[self._rows[n]] for n in self._all]
            self._table = np.stack(rows) if rows else np.zeros((0, 1), np.float32)
            self._places = {n: i for i, n in enumerate(self._all)}
        if pool is None:
            return PoolView(self, self._all, self._table, order)
        names = sorted(n for n in set(pool) if n in self._places)
        return PoolView(self, names, self._table[[self._places[n] for n in names]], order)


class PoolView:
    """`IndexStage` over one query's candidates.

    Attributes:
      names: the candidates, sorted by id.
      ranking: all of them as the first stage ranked them, once searched.
    """

    def __init__(
        self,
        whole: PoolIndex,
        names: Sequence[str],
        table: np.ndarray,
        order: Sequence[str] | None,
    ) -> None:
        self.whole, self.names, self.table, self.order = whole, names, table, order
        self.ranking: list[str] = []

    async def upsert(self, entries: Sequence[IndexEntry], *, timeout_s: float | None = None) -> int:
        raise NotImplementedError("a query's pool is only read")

    async def delete(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> tuple[list[str], list[str]]:
        raise NotImplementedError("a query's pool is only read")

    async def get(
        self, ids: Sequence[str], *, timeout_s: float | None = None
    ) -> list[Document | None]:
        return await self.whole.get(ids, timeout_s=timeout_s)

    async def search(
        self,
        vector: np.ndarray,
        *,
        k: int,
        filter: Filter | None = None,
        embedder_version: str = "",
        timeout_s: float | None = None,
    ) -> tuple[list[Hit], Usage]:
        del filter, embedder_version, timeout_s
        if not self.names:
            return [], Usage("index")
        scores = self.table @ np.asarray(vector, np.float32)
        # Names are sorted, and a stable sort leaves equal scores as they stand.
        best: list[int] = np.argsort(-scores, kind="stable").tolist()
        if self.order is not None:
            place = {name: i for i, name in enumerate(self.order)}
            best.sort(key=lambda i: place.get(self.names[i], len(place)))
        self.ranking = [self.names[i] for i in best]
        hits = [
            Hit(d.id, float(scores[i]), d.reasoning)
            for i in best[:k]
            if (d := self.whole.documents[self.names[i]])
        ]
        return hits, Usage("index")
