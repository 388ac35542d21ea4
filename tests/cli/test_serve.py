"""`tte serve --index`: where a new corpus is searched."""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
import pytest

from tests.cli.conftest import Tte
from tests.index.conftest import needs_milvus
from tests.index.documents import make_entry, unit
from tests.servers.test_index_service import process, search, upsert, warm
from tte.v1 import index_pb2_grpc
from tte_jax.cli import launch


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `tte serve` would start the services with."""
    given: list[str] = []

    @contextlib.contextmanager
    def services(*_, flags, **__):
        given.extend(flags)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(launch, "services", services)
    return given


@needs_milvus
def test_the_services_search_where_the_flag_says_and_remember_it(
    tte: Tte, flags: list[str], tmp_path: Path
) -> None:
    result = tte("serve", "--no-corpus", "--index", f"milvus:{tmp_path / 'm.db'}")
    assert result.exit_code == 0, result.output
    (flag,) = (flag for flag in flags if flag.startswith("--index"))
    assert flag == f"--index=milvus:{tmp_path / 'm.db'}"
    for started_with in ([flag], []):
        with (
            process(tmp_path, *started_with) as (_, address),
            grpc.insecure_channel(address) as channel,
        ):
            stub = index_pb2_grpc.IndexServiceStub(channel)
            assert warm(stub).kind == "milvus"
            stub.Upsert(upsert(make_entry("a", unit(1, 0)), make_entry("b", unit(0, 1))))
            assert [hit.id for hit in stub.Search(search(unit(1, 0))).hits] == ["a", "b"]


def test_what_is_no_index_is_refused_before_anything_starts(tte: Tte, flags: list[str]) -> None:
    result = tte("serve", "--no-corpus", "--index", "faiss")
    assert result.exit_code == 2 and "expected scann, milvus://" in result.stderr
    assert flags == []
