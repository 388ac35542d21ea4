"""`tte demo` from end to end, but for the services' own start: what it writes and its exit code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import Result

from tests.cli.conftest import Tte, document
from tests.cli.system import System
from tte_jax.cli import launch
from tte_jax.cli.demo_queries import QUERIES
from tte_jax.errors import UnavailableError


@pytest.fixture
def demo(
    tte: Tte, system: System, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    @contextlib.contextmanager
    def started(data_dir: Path, **_: Any):
        yield launch.Started(None, system.addresses, data_dir / "log")  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "services", started)
    monkeypatch.setattr(launch, "model_flags", lambda given: [])
    out = ("--out", tmp_path / "demo", "--data-dir", tmp_path / "cache")
    return lambda *arguments: tte("demo", *out, *arguments)


def test_the_demo_writes_what_it_found(demo: Callable[..., Result], tmp_path: Path, few) -> None:
    result = demo()
    assert result.exit_code == 0, result.output
    assert "Query ECR" in result.stdout and "Rank of the right answer" in result.stdout
    report = json.loads((tmp_path / "demo" / "out.json").read_text())
    assert report["problems"] == [] and len(report["queries"]) == len(QUERIES)
    assert report["corpus"]["documents"] == few
    assert report["models"]["embedder"] == "embedder-1"
    for query in report["queries"]:
        assert query["ranked_ids"] == [r["id"] for r in query["results"]]
        assert {u["stage"] for u in query["usage"]} >= {"reason", "embed", "index", "rerank"}
        assert query["updates"][0]["stage"] == "first_stage"
    sheet = Image.open(tmp_path / "demo" / "out.png")
    assert sheet.height > 100 * len(QUERIES)


def test_a_second_demo_finds_the_corpus_and_json_is_one_document(
    demo: Callable[..., Result], tmp_path: Path
) -> None:
    demo()
    report = document(demo("--json"))
    assert report["corpus"]["cached"] is True
    assert report == json.loads((tmp_path / "demo" / "out.json").read_text())


def test_a_stage_that_did_not_run_fails_the_demo(
    demo: Callable[..., Result], system: System, tmp_path: Path
) -> None:
    system.reranker.broken = UnavailableError("it is down")
    try:
        result = demo()
    finally:
        system.reranker.broken = None
    assert result.exit_code == 1
    assert "did not really run" in result.stderr and "not reranked" in result.stderr
    report = json.loads((tmp_path / "demo" / "out.json").read_text())
    assert len(report["problems"]) >= len(QUERIES)
