"""The commands against a real gateway and index: output, JSON, exit codes."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Tte, document
from tests.cli.system import System
from tte_jax.errors import UnavailableError


def png(colour: str, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "blue", "green"):
        (folder / f"{colour}.png").write_bytes(png(colour))
    return folder


@pytest.fixture
def colours(running: Tte, pictures: Path) -> Tte:
    """A corpus of three colours, whose name is in the metadata and nowhere else."""
    labels = {f"{c}.png": {"name": c, "warm": c == "red"} for c in ("red", "blue", "green")}
    table = pictures.parent / "labels.json"
    table.write_text(json.dumps(labels))
    result = running("ingest", pictures, "-m", table, "-m", "kind=colour", "--json")
    assert result.exit_code == 0, result.output
    return running


def test_search_by_text_streams_two_tables_and_explains(colours: Tte) -> None:
    result = colours("search", "something", "red", "--explain", "-f", "kind=colour")
    assert result.exit_code == 0, result.output
    assert result.stdout.index("First stage") < result.stdout.index("Reranked")
    assert "Query ECR" in result.stdout and "something red" in result.stdout
    for stage in ("reason", "embed", "index", "rerank"):
        assert stage in result.stdout
    assert "red.png" in result.stdout


def test_search_json_is_one_document_with_every_score(colours: Tte) -> None:
    result = colours("search", "red", "-k", 2, "--json", "-f", "kind=colour")
    made = document(result)
    assert [r["id"] for r in made["results"]][0] == "red.png"
    best = made["results"][0]
    assert best["rank"] == 1 and best["rerank"] == pytest.approx(1.0)
    assert best["cosine"] == pytest.approx(1.0)
    assert best["metadata"] == {"name": "red", "warm": True, "kind": "colour"}
    assert best["reasoning"]["answer"] == "red"
    assert len(made["results"]) == 2
    assert made["final"] is True and made["degraded"] == []
    assert [u["stage"] for u in made["updates"]] == ["first_stage", "reranked"]
    assert {u["stage"] for u in made["usage"]} >= {"reason", "embed", "index", "rerank"}
    assert made["query_reasoning"]["answer"] == "red"


def test_search_by_image_and_by_image_with_a_change(colours: Tte, pictures: Path) -> None:
    same = document(colours("search", "-i", pictures / "blue.png", "-f", "kind=colour", "--json"))
    assert same["results"][0]["id"] == "blue.png"
    changed = document(
        colours("search", "-i", pictures / "blue.png", "but", "cold", "--json", "--budget", "8")
    )
    assert changed["query_reasoning"]["answer"] == "blue but cold"


def test_filters_and_budgets_reach_the_gateway(colours: Tte) -> None:
    made = document(
        colours("search", "red", "--filter", "warm=false", "--budget", "rerank=0", "--json")
    )
    ids = [r["id"] for r in made["results"]]
    assert ids and "red.png" not in ids
    assert made["stage"] == "first_stage" and made["results"][0]["rerank"] is None


def test_a_sick_stage_degrades_and_says_so(colours: Tte, system: System) -> None:
    system.reranker.broken = UnavailableError("it is being repaired")
    try:
        shown = colours("search", "red", "-f", "kind=colour", "--timeout", 20)
        made = document(colours("search", "red", "-f", "kind=colour", "--json", "--timeout", 20))
    finally:
        system.reranker.broken = None
    assert shown.exit_code == 0 and "Degraded" in shown.stderr
    assert made["results"][0]["id"] == "red.png"
    assert [d["stage"] for d in made["degraded"]] == ["rerank"]


def test_ingest_again_finds_everything_unchanged(running: Tte, pictures: Path) -> None:
    first = document(running("ingest", pictures, "--id-prefix", "again/", "--json"))
    assert (first["stored"], first["bad"]) == (3, [])
    second = document(running("ingest", pictures, "--id-prefix", "again/", "--json"))
    assert (second["stored"], second["unchanged"]) == (0, 3)


def test_bad_files_are_listed_with_reasons_and_the_rest_is_stored(
    running: Tte, pictures: Path
) -> None:
    (pictures / "broken.png").write_bytes(b"\x89PNG and then nothing")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "copy.png").write_bytes(png("red"))
    (pictures / "more.jsonl").write_text('{"id": "p", "text": "poison"}\nnot json\n')
    result = running("ingest", pictures, "--id-prefix", "mixed/", "--json")
    assert result.exit_code == 1
    made = document(result)
    assert made["stored"] == 3 and made["duplicates"] == 1
    reasons = {b["source"].rpartition("/")[2]: b["message"] for b in made["bad"]}
    assert set(reasons) == {"broken.png", "empty.png", "more.jsonl:1", "more.jsonl:2"}
    assert "0 bytes" in reasons["empty.png"] and "not JSON" in reasons["more.jsonl:2"]
    assert "poison" in reasons["more.jsonl:1"]
    assert all(str(pictures) in line for line in result.stderr.splitlines() if "png" in line)
    assert document(running("get", "mixed/copy.png", "--json"))["id"] == "mixed/copy.png"


def test_pdfs_and_videos_are_ingested_and_a_second_run_reasons_about_nothing(
    running: Tte, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    pages = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    pages[0].save(folder / "doc.pdf", save_all=True, append_images=pages[1:])
    (folder / "film.mp4").write_bytes(b"any bytes")
    (folder / "broken.pdf").write_bytes(b"%PDF-")
    first = running("ingest", folder, "--id-prefix", "kinds/", "--json")
    assert first.exit_code == 1
    made = document(first)
    assert made["stored"] == 3 and [b["source"][-10:] for b in made["bad"]] == ["broken.pdf"]
    stored = document(running("get", "kinds/doc.pdf#page=2", "--json"))
    assert stored["metadata"] == {"page": 2, "pages": 2}
    assert stored["media"][0]["kind"] == "page"
    again = document(running("ingest", folder, "--id-prefix", "kinds/", "--json"))
    assert (again["stored"], again["unchanged"]) == (0, 3)


def test_get_shows_and_saves_a_document(colours: Tte, tmp_path: Path) -> None:
    out = tmp_path / "saved"
    made = document(colours("get", "green.png", "--save", out, "--json"))
    assert made["metadata"]["name"] == "green" and made["reasoning"]["answer"] == "green"
    (path,) = map(Path, made["saved"])
    assert path.read_bytes() == png("green") and path.parent == out
    refused = colours("get", "green.png", "--save", path)
    assert refused.exit_code == 2 and "File exists; give a folder" in " ".join(
        refused.stderr.split()
    )
    assert "green.png" in colours("get", "green.png").stdout


def test_delete_reports_what_was_not_there(running: Tte, pictures: Path) -> None:
    running("ingest", pictures, "--id-prefix", "gone/", "--json")
    result = running("delete", "gone/red.png", "gone/never.png", "--json")
    assert document(result) == {"deleted": ["gone/red.png"], "unknown": ["gone/never.png"]}
    assert result.exit_code == 3
    assert running("get", "gone/red.png").exit_code == 3


def test_reason_embed_and_rerank_ask_one_service_each(running: Tte, pictures: Path) -> None:
    made = document(running("reason", "--image", pictures / "red.png", "--json"))
    assert made["reasoning"]["answer"] == "red" and made["usage"]["tokens_out"] == 4
    made = document(running("embed", "abba", "--json"))
    assert made["dimension"] == 26
    assert made["embedding"][:3] == pytest.approx([0.5**0.5, 0.5**0.5, 0.0])
    made = document(running("rerank", "red car", "blue car", "red car", "tree", "--json"))
    assert [(r["index"], r["score"]) for r in made["results"]] == [(1, 1.0), (0, 0.5), (2, 0.0)]
    for command in (["reason", "red"], ["embed", "red"], ["rerank", "red", "blue"]):
        assert running(*command).exit_code == 0


def test_status_shows_all_services(running: Tte) -> None:
    result = running("status", "--json")
    made = document(result)
    assert result.exit_code == 0 and made["serving"] is True
    found = {s["service"]: s for s in made["services"]}
    assert list(found) == ["gateway", "reasoner", "embedder", "reranker", "index"]
    assert found["embedder"]["about"]["model_version"] == "embedder-1"
    assert isinstance(found["index"]["about"]["documents"], int)
    shown = running("status").stdout
    assert "SERVING" in shown and "documents" in shown


def test_the_environment_sets_flags(colours: Tte, system: System) -> None:
    made = document(
        colours("search", "red", TTE_JSON="1", TTE_SEARCH_TOP_K="1", TTE_SEARCH_BUDGET="rerank=0")
    )
    assert len(made["results"]) == 1 and made["stage"] == "first_stage"
    elsewhere = colours("search", "red", TTE_ADDRESS="127.0.0.1:1", TTE_TIMEOUT="5")
    assert elsewhere.exit_code == 4


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    "command",
    [
        ("search", "a cat"),
        ("get", "x"),
        ("delete", "x"),
        ("reason", "a cat"),
        ("embed", "a cat"),
        ("rerank", "a", "b"),
    ],
)
def test_no_server_is_exit_4_with_a_hint(tte: Tte, nobody: str, command: tuple[str, ...]) -> None:
    result = tte(*command, "--address", nobody, "--timeout", "10")
    assert result.exit_code == 4, result.output
    assert "make serve" in result.stderr and nobody in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


def test_errors_are_json_too_when_asked(tte: Tte, nobody: str) -> None:
    result = tte("search", "a cat", "--address", nobody, "--json", "--timeout", "10")
    made = document(result)
    assert made["error"]["exit_code"] == result.exit_code == 4
    assert made["error"]["reason"] and nobody in made["error"]["message"]


def test_status_of_nothing_is_exit_4(tte: Tte, nobody: str) -> None:
    result = tte("status", "--address", nobody, "--json")
    assert result.exit_code == 4
    assert document(result)["services"][0]["health"] == "UNREACHABLE"
    assert "make serve" in result.stderr


@pytest.mark.parametrize("content", [b"", b"this is no image", png("red")[:50]])
def test_a_bad_image_is_exit_2_and_named(tte: Tte, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for command in ("search", "reason", "embed"):
        result = tte(command, "--image", path)
        assert result.exit_code == 2, result.output
        assert "bad.png" in result.stderr and "Traceback" not in result.output


def test_missing_files_are_exit_3(tte: Tte, tmp_path: Path) -> None:
    for command in (("search", "--image"), ("ingest",)):
        result = tte(*command, tmp_path / "absent.png")
        assert result.exit_code == 3, result.output
        assert "absent.png" in result.stderr


def test_an_unknown_document_is_exit_3(running: Tte) -> None:
    result = running("get", "no such id")
    assert result.exit_code == 3
    assert "no such id" in result.stderr


@pytest.mark.parametrize(
    "command", [("search",), ("search", "  "), ("embed",), ("rerank", "", "a")]
)
def test_an_empty_query_is_exit_2(tte: Tte, command: tuple[str, ...]) -> None:
    result = tte(*command)
    assert result.exit_code == 2
    assert "Error" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "a", "--budget", "lots"),
        ("search", "a", "--filter", "skin"),
        ("search", "a", "--address", "nowhere"),
        ("search", "a", "--top-k", "0"),
        ("search", "a", "--timeout", "0"),
        ("search", "a", "--no-such-flag"),
        ("no-such-command",),
        ("serve", "--models", "judge=."),
    ],
)
def test_wrong_usage_is_exit_2(tte: Tte, arguments: tuple[str, ...]) -> None:
    result = tte(*arguments)
    assert result.exit_code == 2
    assert result.stderr and "Traceback" not in result.output


def test_nothing_to_ingest_is_exit_2(tte: Tte, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    result = tte("ingest", tmp_path)
    assert result.exit_code == 2 and "no image" in result.stderr


def test_an_unknown_model_directory_is_exit_3(tte: Tte, tmp_path: Path) -> None:
    for value in (tmp_path / "absent", f"reranker={tmp_path}"):
        result = tte("serve", "--models", value)
        assert result.exit_code == 3, result.output
        assert str(tmp_path) in result.stderr


def test_a_passed_deadline_is_exit_5(colours: Tte, system: System) -> None:
    result = colours("search", "red", "--timeout", "0.001")
    assert result.exit_code == 5, result.output
    assert "--timeout" in result.stderr


def test_a_defect_is_exit_1_without_a_stack_trace(tte: Tte, monkeypatch) -> None:
    def broken(address: str) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("tte_jax.cli.search.connect", broken)
    result = tte("search", "a cat")
    assert result.exit_code == 1
    assert "a defect" in result.stderr and "Traceback" not in result.output


def test_an_interrupt_is_exit_130(tte: Tte, monkeypatch) -> None:
    def interrupted(address: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tte_jax.cli.search.connect", interrupted)
    assert tte("search", "a cat").exit_code == 130


def test_a_broken_ingest_says_how_to_go_on(tte: Tte, nobody: str, pictures: Path) -> None:
    result = tte("ingest", pictures, "--address", nobody)
    assert result.exit_code == 4, result.output
    assert "again to go on" in result.stderr and "0 documents" in result.stderr


def test_help_and_version(tte: Tte) -> None:
    assert "Exit codes" in tte("--help").stdout
    for command in ("serve", "ingest", "search", "status", "get", "embed", "rerank", "demo"):
        assert tte(command, "--help").exit_code == 0
