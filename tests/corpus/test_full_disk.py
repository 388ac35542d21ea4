"""A real file system that is full, or read-only: clear errors, and nothing is lost.

Needs the right to mount; elsewhere the same errors are raised at the seams (`test_store`,
`test_media`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.index.documents import make_entry, unit
from tte_jax.errors import PreconditionError, StorageFullError
from tte_jax.index import CorpusIndex


def mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)):
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_refuses_writes_keeps_what_is_there_and_goes_on_when_there_is_space(disk):
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * 1_000_000)
    index = CorpusIndex.open(disk / "corpus")
    stored = 0
    with pytest.raises(StorageFullError, match="Free disk space"):
        while stored < 1000:
            data = b"%04d" % stored * 5000
            index.upsert([make_entry(f"d{stored:03d}", unit(1, stored), image=data)])
            stored += 1
    assert 5 < stored < 1000
    (disk / "last").write_bytes(b"x" * _free(disk))

    def holds(index: CorpusIndex) -> None:
        assert index.verify() == []
        ids = {hit.id for hit in index.search(unit(1, 0), 1000)}
        assert ids == {f"d{i:03d}" for i in range(stored)}

    # Without a single byte left: neither a document, nor one without media, nor a snapshot.
    for write in (
        lambda: index.upsert([make_entry("media", unit(1, 0), image=b"y" * 9000)]),
        lambda: index.upsert([make_entry(f"t{i}", unit(1, 0), text="z" * 9000) for i in range(9)]),
        index.snapshot,
    ):
        with pytest.raises(StorageFullError):
            write()
        holds(index)
    index.close()
    with pytest.raises(StorageFullError):  # SQLite's log needs a little room to start
        CorpusIndex.open(disk / "corpus")
    ballast.unlink()
    with closing(CorpusIndex.open(disk / "corpus")) as index:
        holds(index)
        index.upsert([make_entry(f"d{stored:03d}", unit(1, stored), image=b"y" * 9000)])
        stored += 1
        index.snapshot()
        holds(index)
    with closing(CorpusIndex.open(disk / "corpus")) as index:
        holds(index)


def _free(disk: Path) -> int:
    free = subprocess.run(
        ["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True, check=True
    )
    return int(free.stdout.split()[1])


def test_a_read_only_disk_is_named_and_loses_nothing(disk):
    with closing(CorpusIndex.open(disk / "corpus")) as index:
        index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    assert mount("-o", "remount,ro", str(disk))
    for corpus in (disk / "corpus", disk / "new"):
        with pytest.raises(PreconditionError, match=r"cannot be written.*Mount it writable") as bad:
            CorpusIndex.open(corpus)
        assert bad.value.reason == "READ_ONLY"
    assert mount("-o", "remount,rw", str(disk))
    with closing(CorpusIndex.open(disk / "corpus")) as index:
        assert index.get(["a"])[0].content.media[0].data == b"one"
        assert index.verify() == []
