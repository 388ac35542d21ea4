"""The same tests over both indices: `open_index` opens a corpus searched by ScaNN or by Milvus."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from tte_jax.index import CorpusIndex

MISSING = [m for m in ("pymilvus", "milvus_lite") if importlib.util.find_spec(m) is None]
if not MISSING:
    # Its import shuts down all log handlers; absl's then closes its stream, which is the test run's
    # own standard error when the import happens inside a runner that has replaced `sys.stderr`.
    importlib.import_module("pymilvus")
needs_milvus = pytest.mark.skipif(
    bool(MISSING), reason=f"the extra `milvus` is not installed: {', '.join(MISSING)} missing"
)


@pytest.fixture(params=["scann", pytest.param("milvus", marks=needs_milvus)])
def open_index(request, tmp_path):
    """Opens the corpus (again); everything is closed at the end."""
    opened: list[CorpusIndex] = []

    def open_(**options) -> CorpusIndex:
        for index in opened:
            index.close()
        where = "scann" if request.param == "scann" else f"milvus:{tmp_path / 'milvus.db'}"
        opened.append(CorpusIndex.open(tmp_path / "corpus", index=where, **options))
        return opened[-1]

    yield open_
    for index in opened:
        index.close()
