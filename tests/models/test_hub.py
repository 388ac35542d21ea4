"""Hub ids, without a network: the hub's cache on disk, and what is said of absent models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import tte_jax
from tests.models.conftest import Checkpoint, text_batch
from tte_jax.errors import NotFoundError
from tte_jax.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, offline; the variables are read when the library is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, repo: str, directory: Path, *, ref: str = "main") -> Path:
    """The layout that `snapshot_download` leaves: blobs, links to them, a name for the commit."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(COMMIT)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copyfile(file, place / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_model_in_the_cache(saved: Callable[..., Checkpoint], cache: Path) -> None:
    source = saved("qwen3", tied=True).path
    snapshot = put(cache, "Owner/Tiny-Qwen3", source)
    assert hub.local("Owner/Tiny-Qwen3") == snapshot
    assert hub.local("Owner/Tiny-Qwen3@main") == hub.local(f"Owner/Tiny-Qwen3@{COMMIT}") == snapshot
    batch = text_batch("right")
    ours = tte_jax.load_model("Owner/Tiny-Qwen3")(**batch).logits
    np.testing.assert_array_equal(ours, tte_jax.load_model(source)(**batch).logits)


def test_revisions(saved: Callable[..., Checkpoint], cache: Path) -> None:
    snapshot = put(cache, "Owner/Tiny", saved("qwen3", tied=True).path, ref="v1.0")
    assert hub.local("Owner/Tiny@v1.0") == snapshot
    with pytest.raises(NotFoundError, match="Owner/Tiny@v2.0"):
        hub.local("Owner/Tiny@v2.0")


def test_a_directory_comes_first(saved: Callable[..., Checkpoint], cache: Path) -> None:
    put(cache, "models/tiny", saved("qwen3", tied=True).path)
    here = Path("models/tiny")
    here.mkdir(parents=True)
    assert hub.local("models/tiny") == here
    for path in ("/a/b", "./a/b", "../a", "a", "a/b/c", ""):
        assert hub.local(path) == Path(path), "no hub id"


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'Owner/Absent'[\s\S]*cannot be reached") as caught:
        tte_jax.load_model("Owner/Absent")
    assert caught.value.reason == "MODEL_NOT_FETCHED"


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not offline by wish: nothing listens at the hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.file_download, "ENDPOINT", "http://127.0.0.1:9", False)
    with pytest.raises(NotFoundError, match="cannot be reached"):
        hub.fetch("Owner/Absent")


def test_only_what_a_model_needs_is_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.fetch("Owner/Name@refs/pr/1") == cache
    assert (asked["repo"], asked["revision"]) == ("Owner/Name", "refs/pr/1")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "onnx/config.json",
        "README.md",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == files[:5]


def test_the_environment_is_respected(saved: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """In a process of its own, as the variables are read at import."""
    snapshot = put(tmp_path / "hub", "Owner/Tiny", saved("qwen3", tied=True).path)
    code = "import sys; from tte_jax.weights import hub; print(hub.local(sys.argv[1]))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, "Owner/Tiny"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip() == str(snapshot), done.stderr
