"""One Milvus collection: made, written, searched, compared. The only module that imports pymilvus.

What the server can do is asked, not assumed: a Milvus has the index type SCANN; milvus-lite accepts
it and then fails in the background, so it gets FLAT, which is exact.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tte_jax.corpus.records import MAX_ID_BYTES, Stored
from tte_jax.errors import PreconditionError, UnavailableError
from tte_jax.index import milvus_fields
from tte_jax.index.location import MilvusLocation

log = logging.getLogger(__name__)

_FIELDS = (milvus_fields.NUMBERS, milvus_fields.TEXTS, milvus_fields.FLAGS)
_CONNECT_S = 10.0
# Without one, pymilvus tries again for minutes.
_CALL_S = 30.0
_MOST_HITS = 16_384  # Milvus's own limit
# Exact scoring of the answers needs a few more than k: those that tie with the last.
_TIES = 10


class Milvus:
    """A connection. Any thread may use it.

    Raises:
      PreconditionError: the extra is not installed (`EXTRA_MISSING`).
      UnavailableError: there is no answer.
    """

    def __init__(self, location: MilvusLocation) -> None:
        self.location = location
        missing = [
            name
            for name in ("pymilvus", *(["milvus_lite"] if location.is_file else []))
            if importlib.util.find_spec(name) is None
        ]
        if missing:
            raise PreconditionError(
                f"the index {location.text} needs {', '.join(missing)}, which is not installed: "
                "pip install tte-jax[milvus]",
                reason="EXTRA_MISSING",
            )
        from pymilvus import MilvusClient

        with self.translated("connect to"):
            self.client: Any = MilvusClient(
                location.uri,
                token=os.environ.get("TTE_MILVUS_TOKEN", ""),
                db_name=location.database,
                timeout=_CONNECT_S,
            )
            self.version = str(self.client.get_server_version())

    @property
    def index_type(self) -> str:
        return "FLAT" if "lite" in self.version else "SCANN"

    @property
    def exact(self) -> bool:
        """Whether its searches find everything."""
        return self.index_type == "FLAT"

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Milvus's own errors as `UnavailableError`, which say what was tried and where."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError, ConnectionError) as error:
            said = str(getattr(error, "message", "") or type(error).__name__).splitlines()[0]
            raise UnavailableError(
                f"could not {what} the index {self.location.text}: {said}",
                reason="MILVUS_UNAVAILABLE",
            ) from error

    def collection(self, name: str, dimension: int) -> Collection:
        """Opens it, or makes it."""
        with self.translated("open a collection in"):
            if not self.client.has_collection(name, timeout=_CALL_S):
                self._create(name, dimension)
            self._load(name)
        return Collection(self, name, dimension)

    def has(self, name: str) -> bool:
        with self.translated("look into"):
            return bool(self.client.has_collection(name, timeout=_CALL_S))

    def drop(self, name: str) -> None:
        with self.translated("drop a collection of"):
            self.client.drop_collection(name, timeout=_CALL_S)

    def close(self) -> None:
        self.client.close()

    def _load(self, name: str) -> None:
        from pymilvus.exceptions import MilvusException

        if self.location.is_file and not self.client.list_indexes(name):
            # Killed between the two steps below.
            self.client.create_index(name, self._vector_index(), timeout=_CALL_S)
        try:
            self.client.load_collection(name, timeout=_CALL_S)
        except MilvusException as error:
            # milvus-lite writes its index files in place: killed meanwhile, it leaves half a file,
            # which it cannot read. The documents are whole, and make the index again.
            if not self.location.is_file:
                raise
            log.warning("the index files of %s are made anew: %s", self.location.text, error)
            self.client.drop_index(name, "vector", timeout=_CALL_S)
            self.client.create_index(name, self._vector_index(), timeout=_CALL_S)
            self.client.load_collection(name, timeout=_CALL_S)

    def _create(self, name: str, dimension: int) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_BYTES, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        for field in _FIELDS:
            schema.add_field(field, DataType.JSON)
        self.client.create_collection(
            name,
            schema=schema,
            index_params=self._vector_index(),
            consistency_level="Strong",
            timeout=_CALL_S,
        )

    def _vector_index(self) -> Any:
        index = self.client.prepare_index_params()
        more = {"nlist": 1024, "with_raw_data": True} if self.index_type == "SCANN" else {}
        # Vectors are of unit length, so the inner product is the cosine.
        index.add_index("vector", index_type=self.index_type, metric_type="IP", params=more)
        return index


class Collection:
    """The documents of one generation: id, vector, metadata."""

    def __init__(self, milvus: Milvus, name: str, dimension: int) -> None:
        self.name = name
        self.dimension = dimension
        self._milvus = milvus
        self._client = milvus.client

    def put(self, documents: Sequence[Stored]) -> None:
        """Insert or replace; ids must differ. The server keeps it through a crash."""
        if not documents:
            return
        data = [
            {"id": d.id, "vector": d.vector, **milvus_fields.encode(d.metadata)} for d in documents
        ]
        with self._milvus.translated("write to"):
            self._client.upsert(self.name, data, timeout=_CALL_S)

    def remove(self, ids: Sequence[str]) -> None:
        """Unknown ids are no error."""
        if ids:
            with self._milvus.translated("delete from"):
                self._client.delete(self.name, ids=list(ids), timeout=_CALL_S)

    def flush(self) -> None:
        """Everything written so far is in the server's segments when it returns."""
        with self._milvus.translated("flush"):
            self._client.flush(self.name, timeout=_CALL_S)

    def count(self) -> int:
        with self._milvus.translated("count"):
            rows = self._client.query(self.name, output_fields=["count(*)"], timeout=_CALL_S)
        return int(rows[0]["count(*)"])

    def get(self, ids: Sequence[str]) -> dict[str, tuple[np.ndarray, dict[str, dict]]]:
        """(vector, the three metadata fields) of those that are there."""
        with self._milvus.translated("read"):
            found = self._client.get(
                self.name, ids=list(ids), output_fields=["id", "vector", *_FIELDS], timeout=_CALL_S
            )
        return {
            row["id"]: (np.array(row["vector"], np.float32), {f: row[f] or {} for f in _FIELDS})
            for row in found
        }

    def ids(self) -> Iterator[str]:
        """All ids, in any order."""
        with self._milvus.translated("read"):
            pages = self._client.query_iterator(self.name, batch_size=1000, output_fields=["id"])
            try:
                while page := pages.next():
                    yield from (row["id"] for row in page)
            finally:
                pages.close()

    def search(
        self, queries: np.ndarray, k: int, condition: str
    ) -> list[tuple[list[str], np.ndarray]]:
        """For each query: ids of about k nearest, and their vectors [M, D] float32."""
        wanted = min(_MOST_HITS, k + _TIES)
        # A sixteenth of the 1024 lists, and as many exact scores as ours takes.
        tuned = {"nprobe": 64, "reorder_k": max(200, 2 * wanted)}
        with self._milvus.translated("search"):
            found = self._client.search(
                self.name,
                data=list(queries),
                filter=condition,
                limit=wanted,
                output_fields=["vector"],
                search_params={"params": tuned if self._milvus.index_type == "SCANN" else {}},
                consistency_level="Strong",
                timeout=_CALL_S,
            )
        out: list[tuple[list[str], np.ndarray]] = []
        for hits in found:
            vectors = [hit["entity"]["vector"] for hit in hits]
            out.append(
                (
                    [hit["id"] for hit in hits],
                    np.array(vectors, np.float32).reshape(len(hits), self.dimension),
                )
            )
        return out


def batches(dimension: int) -> int:
    """Documents in one write: about 2 MB of vectors, far below the server's message limit."""
    return max(1, min(1000, math.floor(2**21 / (4 * dimension))))
