"""What the corpus asks of an index over its vectors, and the live index of a searcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tte_jax.corpus.records import Change
from tte_jax.filters import Filter
from tte_jax.index.maintenance import Job
from tte_jax.index.reports import Found, IndexState, RebuildReport, SnapshotReport


class VectorIndex(Protocol):
    """Nearest-neighbour search over everything that the corpus's database holds.

    The database is the truth and is written first; an index follows it, and can be made again
    from it at any time. `ScannIndex` keeps its vectors in this process's memory, `MilvusIndex` in
    Milvus. Every method may be called from any thread, except that the caller lets no two of
    `apply`, `exchange` and `differences` run at once.
    """

    @property
    def embedder_version(self) -> str:
        """What made the vectors, "" while there are none; kept by the caller."""
        ...

    @embedder_version.setter
    def embedder_version(self, version: str) -> None: ...

    @property
    def documents(self) -> int:
        """Live documents."""
        ...

    @property
    def sequence(self) -> int:
        """The last write that a search sees."""
        ...

    def apply(self, changes: Sequence[Change]) -> None:
        """Make a batch of committed writes visible, all at once, to the next search.

        Raises:
          UnavailableError: the index cannot be reached. The writes are durable and will become
            visible; no search is answered without them.
        """
        ...

    def search(
        self,
        queries: np.ndarray,
        k: int,
        filter: Filter | None = None,
        *,
        embedder_version: str = "",
    ) -> list[list[Found]]:
        """For each query the k live documents of highest cosine that match, ties by id.

        Args:
          queries: [Q, D] float32, L2-normalised.
          k: at least 1.
          filter: condition on metadata, the same for all.
          embedder_version: what made the queries; "" = it is not checked.

        Raises:
          PreconditionError: another dimension (`DIMENSION_MISMATCH`) or embedder
            (`EMBEDDER_MISMATCH`) than the corpus has.
        """
        ...

    def state(self) -> IndexState: ...

    def rebuild(self) -> RebuildReport:
        """Make the index anew beside serving, check it, and let it serve."""
        ...

    def snapshot(self) -> SnapshotReport:
        """Remember what the index holds, so that the next start begins there."""
        ...

    def prepare(self) -> Any:
        """An index of the staged vectors, made beside serving; for the next `exchange`, until which
        it stands whatever is written and rebuilt, unless another one is prepared."""
        ...

    def exchange(
        self, prepared: Any, promoted: Mapping[str, tuple[int, int]], embedder_version: str
    ) -> None:
        """Serve what was prepared, brought to what `Staging.promote` has just made the truth."""
        ...

    def jobs(self) -> Sequence[Job]:
        """Work beside serving, in the order in which it should be done."""
        ...

    @property
    def work_due(self) -> bool:
        """Whether searches alone have made one of the jobs due; cheap."""
        ...

    def differences(self) -> Iterable[str]:
        """What differs from the database, one sentence each. No write happens meanwhile."""
        ...

    def close(self) -> None: ...


class Searcher(Protocol):
    """An immutable index over the rows of one [N, D] float32 matrix; safe from many threads.

    It proposes rows; the live index scores them exactly, drops the dead and breaks ties. So a
    searcher can miss a neighbour, but it can never report a wrong score or a deleted document.
    """

    kind: str

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """About `count` rows likely to be nearest to each of `queries` [Q, D].

        Returns:
          rows: [Q, C] int64, unique within a query, any order; -1 where it found fewer.
          scores: [Q, C] float32 cosines, right to within `exact.SLACK`; -inf where there is none.
        """
        ...

    def search_harder(self) -> bool:
        """Trade speed for recall by one step; False when there is no step left.

        Called only while the searcher is being checked, before it serves.
        """
        ...
