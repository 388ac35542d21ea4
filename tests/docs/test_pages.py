"""What the documentation shows really works: links, Python snippets, names of commands."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.system import System
from tte_jax.cli.app import app
from tte_jax.client import Client
from tte_jax.content import Content, Document

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    if "import" in code  # the architecture's signatures are not programs
]
ids = [page.name for page in PAGES]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running = System(tmp_path_factory.mktemp("system"))
    address = running.addresses["gateway"]
    person = Document(
        "openmoji:1F9D1-200D-1F4BB",
        Content.of("", png()),
        {"name": "doctor", "gender": "woman", "skin": "dark"},
    )
    with Client(address) as client:
        assert list(client.ingest([person]))[-1].stored == 1
    yield address
    running.stop()


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_snippets_run(
    code: str,
    gateway: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/one.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    assert "127.0.0.1:50060" in code
    exec(compile(code.replace("127.0.0.1:50060", gateway), "snippet", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_snippets_to_run() -> None:
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_commands_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    commands = {command.name for command in app.registered_commands}
    commands |= {group.typer_instance.info.name for group in app.registered_groups}
    shown = set(re.findall(r"^(?:\.venv/bin/)?tte ([a-z]+)", text, re.M))
    shown |= set(re.findall(r"`(?:\.venv/bin/)?tte ([a-z]+)", text))
    assert shown <= commands
    for module in re.findall(r"python -m ([\w.]+\w)", text):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z]+)(?:`|\s+#)", text, re.M)) <= targets


def test_the_architectures_rooms_exist_and_hold_what_it_says() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \| (.+) \|$", text, re.M)
    assert len(rows) > 15
    for rooms, holds in rows:
        paths = re.findall(r"`([^`]+)`", rooms)
        assert all((ROOT / path).exists() for path in paths), rooms
        folder = ROOT / paths[0]
        if not folder.is_dir():
            continue
        for name in re.findall(r"`([a-z_0-9]+)`", holds):
            known = (f"{name}.py", f"{name}.proto", name)
            outside = name in ("tte", "planning") or (ROOT / "tte_jax" / f"{name}.py").exists()
            assert outside or any((folder / k).exists() for k in known), f"{rooms}: {name}"


def test_every_package_of_the_library_has_a_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for file in (ROOT / "tte_jax").glob("*/__init__.py"):
        assert f"`tte_jax/{file.parent.name}/`" in text


def test_the_faults_tests_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) >= 30
    for file, test in named:
        found = re.findall(rf"^(?:async )?def {test}\(", (ROOT / file).read_text(), re.M)
        assert len(found) == 1, f"{file}::{test}"
    faults = re.findall(r"^\| F(\d+) .*\| `tests/", text, re.M)
    assert faults == [str(number) for number in range(1, 19)]
