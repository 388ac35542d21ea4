"""Ingest with a local Ray of two workers, through a real gateway and a real index."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.system import System
from tte_jax.client import Client
from tte_jax.errors import NotFoundError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/ray/ingest.py"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
    ),
    pytest.mark.timeout(580),  # starting Ray takes long on a busy machine
]


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _stored(gateway: str, ids: list[str]) -> int:
    count = 0
    with Client(gateway) as client:
        for id in ids:
            try:
                client.get_document(id)
                count += 1
            except NotFoundError:
                pass
    return count


def test_a_killed_ingest_goes_on_and_bad_files_are_listed_at_the_end(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    names = [f"sub/{i:02d}.png" for i in range(24)]
    for i, name in enumerate(names):
        buffer = io.BytesIO()
        Image.new("RGB", (4 + i, 4), ["red", "blue", "green", "yellow"][i % 4]).save(buffer, "PNG")
        (pictures / name).write_bytes(buffer.getvalue())
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "more.jsonl").write_text('{"id": "t1", "text": "a red text"}\n{"id": "t2"}\n')
    (pictures / "notes.txt").write_text("not for us")
    system = System(tmp_path / "system")
    try:
        gateway = system.addresses["gateway"]
        command = (
            *("--gateway", gateway, "--workers", "2", "--share", "2", "--metadata", "set=demo"),
            str(pictures),
        )
        system.embedder.delay = 1.0  # so that the first run is found in the middle
        first = _start(*command)
        while not (before := _stored(gateway, names)):
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)  # Ray's own processes die with it
        first.communicate()
        assert before < len(names)
        system.embedder.delay = 0.0
        second = _start(*command)
        said, errors = second.communicate()
        assert second.returncode == 1, errors
        counts = json.loads([line for line in said.splitlines() if line.startswith('{"')][-1])
        assert (counts["bad"], counts["others"]) == (2, 1)
        assert counts["unchanged"] >= before and counts["stored"] >= 1
        assert counts["unchanged"] + counts["stored"] == 25
        assert "broken.png" in errors and "more.jsonl:2" in errors
        assert _stored(gateway, names) == len(names)
        with Client(gateway) as client:
            found = client.get_document("sub/05.png")
            assert found.metadata == {"set": "demo"}
            assert found.reasoning.answer == "blue"
            assert client.get_document("t1").content.text == "a red text"
    finally:
        system.stop()
