from __future__ import annotations

import errno
import hashlib
import os
import uuid

import pytest

from tte_jax.corpus.media import LocalMedia, ObjectMedia, open_media
from tte_jax.errors import DataLossError, PreconditionError, StorageFullError


@pytest.fixture(params=["local", "fsspec files", "object"])
def media(request, tmp_path):
    if request.param == "local":
        return open_media(tmp_path / "media")
    if request.param == "fsspec files":
        return open_media(f"local://{tmp_path / 'media'}")
    return open_media(f"memory://corpus-{uuid.uuid4().hex}")


def test_uri_chooses_the_store(tmp_path):
    assert isinstance(open_media(tmp_path), LocalMedia)
    assert isinstance(open_media(f"file://{tmp_path}"), LocalMedia)
    assert isinstance(open_media("memory://x"), ObjectMedia)


def test_bytes_come_back_by_their_hash(media):
    for data in (b"", b"\x00\xff" * 1000, b"png"):
        sha256 = media.put(data)
        assert sha256 == hashlib.sha256(data).hexdigest()
        assert media.put(data) == sha256
        assert media.get(sha256) == data


def test_missing_and_removed(media):
    with pytest.raises(DataLossError) as caught:
        media.get("0" * 64)
    assert caught.value.reason == "MEDIA_MISSING"
    sha256 = media.put(b"x")
    media.remove(sha256)
    media.remove(sha256)
    with pytest.raises(DataLossError):
        media.get(sha256)


def test_keys_are_those_of_the_content_and_nothing_else(media):
    assert list(media.keys()) == []
    kept = {media.put(b"%d" % i) for i in range(3)}
    assert set(media.keys()) == kept
    assert media.sweep() == 0
    for sha256 in kept:
        media.remove(sha256)
    assert list(media.keys()) == []


def _file(root, sha256):
    return root / sha256[:2] / sha256[2:4] / sha256


def test_a_damaged_file_is_data_loss_and_the_next_put_heals_it(tmp_path):
    media = LocalMedia(tmp_path)
    sha256 = media.put(b"original")
    _file(tmp_path, sha256).write_bytes(b"originaX")
    with pytest.raises(DataLossError, match=sha256) as caught:
        media.get(sha256)
    assert caught.value.reason == "MEDIA_DAMAGED"
    media.put(b"original")
    assert media.get(sha256) == b"original"


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError),
     (errno.EROFS, PreconditionError)],
)  # fmt: skip
def test_a_failing_disk_leaves_no_file_behind(tmp_path, monkeypatch, number, error):
    media = LocalMedia(tmp_path)

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        media.put(b"data")
    monkeypatch.undo()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert media.get(media.put(b"data")) == b"data"
