"""The committed stubs are what the protos say, and the protos are clean."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from tte.v1 import index_pb2, reranker_pb2, retrieval_pb2

ROOT = Path(__file__).resolve().parents[1]


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stubs_are_fresh(tmp_path: Path) -> None:
    fresh = {p.name: p.read_text() for p in _generator().generate(tmp_path)}
    committed = {p.name: p.read_text() for p in (ROOT / "tte" / "v1").glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(committed), "run `make protos` and commit the result"
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"{stale} differ from the protos: run `make protos` and commit the result"


def _buf() -> str:
    buf = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")
    if buf is None:
        pytest.fail("buf is missing: install the `dev` extra (PyPI buf-bin)")
    return buf


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_is_clean(command: list[str]) -> None:
    done = subprocess.run([_buf(), *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_removed_field_is_found_by_buf_breaking(tmp_path: Path) -> None:
    # The gate itself: buf must be configured so that a wire-incompatible change fails.
    changed = tmp_path / "protos" / "tte" / "v1"
    shutil.copytree(ROOT / "protos" / "tte" / "v1", changed)
    shutil.copy(ROOT / "buf.yaml", tmp_path / "buf.yaml")
    same = [_buf(), "breaking", str(tmp_path), "--against", str(ROOT)]
    assert subprocess.run(same, capture_output=True).returncode == 0
    usage = changed / "usage.proto"
    usage.write_text(usage.read_text().replace("  uint64 tokens_out = 3;\n", ""))
    done = subprocess.run(same, capture_output=True, text=True)
    assert done.returncode != 0 and "tokens_out" in done.stdout


def test_the_services_are_those_of_the_design() -> None:
    def methods(file, service: str) -> dict[str, tuple[str, bool, str, bool]]:
        proto = descriptor_pb2.ServiceDescriptorProto()
        file.DESCRIPTOR.services_by_name[service].CopyToProto(proto)
        return {
            m.name: (
                m.input_type.rpartition(".")[2],
                m.client_streaming,
                m.output_type.rpartition(".")[2],
                m.server_streaming,
            )
            for m in proto.method
        }

    assert methods(retrieval_pb2, "RetrievalService") == {
        "Search": ("SearchRequest", False, "SearchResponse", True),
        "Ingest": ("IngestRequest", True, "IngestResponse", True),
        "GetDocument": ("GetDocumentRequest", False, "GetDocumentResponse", False),
        "DeleteDocuments": ("DeleteDocumentsRequest", False, "DeleteDocumentsResponse", False),
    }
    assert methods(reranker_pb2, "RerankerService")["MineNegatives"] == (
        "MineNegativesRequest",
        True,
        "MinedNegatives",
        True,
    )
    wanted = {"Upsert", "Delete", "Search", "Get", "Stats", "Snapshot", "Rebuild", "Verify"}
    wanted |= {"SearchBatch", "FindReasonings", "ListPending", "StageVectors", "PromoteVectors"}
    assert set(methods(index_pb2, "IndexService")) == wanted
