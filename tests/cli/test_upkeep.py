"""`tte corpus`: against files, and against a running index."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.conftest import Tte, document
from tests.cli.system import System
from tests.index.conftest import needs_milvus
from tests.index.documents import make_entry, unit
from tte_jax.index import CorpusIndex


@pytest.fixture
def corpus(tte: Tte) -> Path:
    """A corpus in the data directory that nobody serves."""
    path = Path(os.environ["TTE_DATA_DIR"]) / "corpus"
    index = CorpusIndex.open(path)
    index.upsert([make_entry("a", unit(1, 0), image=b"one"), make_entry("b", unit(0, 1))])
    index.close()
    return path


def test_backup_verify_and_restore(tte: Tte, corpus: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup"
    made = document(tte("corpus", "backup", target, "--json"))
    assert (made["documents"], made["media_files"], made["sequence"]) == (2, 1, 2)
    assert "nothing is lost" in tte("corpus", "verify", target).stdout
    assert tte("corpus", "restore", target).exit_code == 1  # the corpus is still there
    other = tmp_path / "other"
    result = tte("corpus", "restore", target, "--data-dir", other)
    assert result.exit_code == 0 and "2 documents" in " ".join(result.stdout.split())
    made = document(tte("corpus", "verify", "--data-dir", other, "--json"))
    assert made == {"verified": str(other / "corpus"), "problems": []}


def test_verify_lists_what_is_wrong_and_exits_with_1(tte: Tte, corpus: Path) -> None:
    (file,) = corpus.glob("media/*/*/*")
    file.write_bytes(b"onE")
    result = tte("corpus", "verify", "--json")
    assert result.exit_code == 1
    (problem,) = document(result)["problems"]
    assert file.name in problem and file.name in result.stderr
    assert tte("corpus", "verify", "--no-media").exit_code == 0


@needs_milvus
def test_an_index_is_moved_to_milvus_verified_there_and_moved_back(
    tte: Tte, corpus: Path, tmp_path: Path
) -> None:
    to = f"milvus:{tmp_path / 'm.db'}"
    made = document(tte("corpus", "migrate", "--to", to, "--json"))
    assert made == {"source": "scann", "target": to, "documents": 2, "loaded": 2}
    again = tte("corpus", "migrate", "--to", to)
    assert again.exit_code == 0 and f"is {to} already" in again.stdout.replace("\n", "")
    assert tte("corpus", "verify").exit_code == 0
    with closing(CorpusIndex.open(corpus)) as index:
        assert [hit.id for hit in index.search(unit(0, 1), 1)] == ["b"]
        index.vectors._collection.remove(["a"])  # type: ignore[attr-defined]
    result = tte("corpus", "verify", "--json")
    assert result.exit_code == 1
    assert document(result)["problems"] == ["document 'a' is missing from the index"]
    result = tte("corpus", "migrate", "--to", "scann")
    assert result.exit_code == 0 and "2 documents" in " ".join(result.stdout.split())
    assert tte("corpus", "verify").exit_code == 0
    with closing(CorpusIndex.open(corpus)) as index:
        assert index.stats().searcher == "exact"
        assert [hit.id for hit in index.search(unit(1, 0), 1)] == ["a"]


def test_a_move_to_nowhere_is_refused_and_changes_nothing(tte: Tte, corpus: Path) -> None:
    assert tte("corpus", "migrate", "--to", "faiss").exit_code == 2
    assert tte("corpus", "migrate", "--to", "milvus:x.db", "--data-dir", "none").exit_code == 3
    with closing(CorpusIndex.open(corpus)):
        result = tte("corpus", "migrate", "--to", "milvus:x.db")
        assert result.exit_code == 1 and "already open for writing" in result.stderr
    assert tte("corpus", "verify").exit_code == 0


def test_a_running_index_verifies_itself(running: Tte, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "upkeep", "text": "red"}))
    assert running("ingest", tmp_path / "m.jsonl").exit_code == 0
    made = document(running("corpus", "verify", "--json"))
    assert made["problems"] == [] and "served at" in made["verified"]


def test_what_is_not_there_is_exit_3(tte: Tte, tmp_path: Path) -> None:
    for command in (("verify",), ("verify", tmp_path), ("backup", tmp_path / "b")):
        result = tte("corpus", *command)
        assert result.exit_code == 3, result.output
        assert "no " in result.stderr and "Traceback" not in result.output


def test_reembedding_with_the_embedder_that_the_corpus_has_is_refused(
    running: Tte, system: System, tmp_path: Path
) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "again", "text": "red"}))
    assert running("ingest", tmp_path / "m.jsonl").exit_code == 0
    result = running("corpus", "reembed", system.addresses["embedder"])
    assert result.exit_code == 1
    assert "embedder-1" in result.stderr and "already" in result.stderr


def test_reembedding_a_served_corpus(running: Tte, system: System, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "next", "text": "red"}))
    assert running("ingest", tmp_path / "m.jsonl").exit_code == 0
    address = system.addresses["embedder"]
    system.embedder.version = "embedder-2"
    try:
        made = document(running("corpus", "reembed", address, "--no-promote", "--json"))
        assert made["staged"] > 0 and made["pending"] == 0 and not made["promoted"]
        made = document(running("corpus", "reembed", address, "--json"))
        assert made["promoted"] and made["embedder_version"] == "embedder-2"
        assert document(running("search", "red", "--json"))["results"]
    finally:
        system.embedder.version = "embedder-1"
        assert running("corpus", "reembed", address).exit_code == 0
