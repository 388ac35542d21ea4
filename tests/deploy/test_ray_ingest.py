"""Ingest with a local Ray of two workers, through a real gateway and a real index."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.system import System
from tte_jax.client import Client

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
    ),
    pytest.mark.timeout(580),  # starting Ray takes long on a busy machine
]


def _run(*arguments: str) -> tuple[int, dict, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy/ray/ingest.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_two_workers_store_everything_once_and_a_second_run_finds_it_stored(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for i, colour in enumerate(["red", "blue", "green", "yellow"] * 3):
        buffer = io.BytesIO()
        Image.new("RGB", (4 + i, 4), colour).save(buffer, "PNG")
        (pictures / "sub" / f"{i:02d}.png").write_bytes(buffer.getvalue())
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "more.jsonl").write_text('{"id": "t1", "text": "a red text"}\n{"id": "t2"}\n')
    (pictures / "notes.txt").write_text("not for us")
    system = System(tmp_path / "system")
    try:
        gateway = system.addresses["gateway"]
        how = ("--gateway", gateway, "--workers", "2", "--share", "4", "--metadata", "set=demo")
        code, said, errors = _run(*how, str(pictures))
        assert code == 1, errors
        assert (said["stored"], said["unchanged"], said["bad"], said["others"]) == (13, 0, 2, 1)
        assert "broken.png" in errors and "more.jsonl:2" in errors
        with Client(gateway) as client:
            found = client.get_document("sub/05.png")
            assert found.metadata == {"set": "demo"}
            assert found.reasoning.answer == "blue"
            assert client.get_document("t1").content.text == "a red text"
        code, said, errors = _run(*how, str(pictures))
        assert (code, said["stored"], said["unchanged"]) == (1, 0, 13), errors
    finally:
        system.stop()
