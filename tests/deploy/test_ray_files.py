"""Which files the workers of `deploy/ray/ingest.py` are given; Ray is not needed for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy/ray/ingest.py"


def test_files_share_no_id_and_manifests_keep_their_own(monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("ray_ingest", SCRIPT)
    assert spec is not None and spec.loader is not None
    ingest = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ray_ingest", ingest)
    spec.loader.exec_module(ingest)
    found = [
        (Path("/a/docs.jsonl"), "docs.jsonl"),
        (Path("/a/x.png"), "x.png"),
        (Path("/b/docs.jsonl"), "docs.jsonl"),
        (Path("/b/x.png"), "x.png"),
        (Path("/a/x.png"), "x.png"),  # once more by itself
    ]
    files, taken = ingest._distinct(found)
    assert sorted(path for path, _ in files) == [
        Path("/a/docs.jsonl"), Path("/a/x.png"), Path("/b/docs.jsonl"),
    ]  # fmt: skip
    assert [bad.source for bad in taken] == ["/b/x.png"] and "--id-prefix" in taken[0].message
