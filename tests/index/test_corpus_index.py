from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest

from tests.index.documents import make_entry, random_units, unit
from tte_jax.content import Media, Text
from tte_jax.errors import (
    DataLossError,
    InvalidInputError,
    PreconditionError,
    StorageFullError,
    UnavailableError,
)
from tte_jax.filters import Equals
from tte_jax.index import CorpusIndex, IndexConfig, snapshots
from tte_jax.index.generation import Rows


@pytest.fixture
def index(tmp_path):
    index = CorpusIndex.open(tmp_path / "corpus")
    yield index
    index.close()


def _media_files(index: CorpusIndex, root) -> set[str]:
    return {p.name for p in (root / "corpus" / "media").rglob("*") if p.is_file()}


def test_a_document_goes_in_and_comes_out(index):
    entry = make_entry("cat", unit(1, 0), text="a cat", image=b"png", metadata={"n": 1})
    assert index.upsert([entry, make_entry("dog", unit(0, 1))]) == 2
    (hit,) = index.search(unit(1, 0.1), 1)
    assert hit.id == "cat"
    assert hit.cosine == pytest.approx(float(unit(1, 0.1)[0]))
    assert hit.reasoning == entry.document.reasoning
    assert hit.metadata == {"n": 1}
    cat, missing, dog = index.get(["cat", "bird", "dog"])
    assert cat.content == entry.document.content
    assert cat.content.content_hash == entry.document.content.content_hash
    assert (cat.sequence, dog.sequence, missing) == (1, 2, None)
    assert index.fetch(["cat"], omit_media=True)[0].document.content.parts == (Text("a cat"),)
    versions = index.existing(["cat", "bird"])
    assert index.fetch(["bird", "cat"])[1].versions == versions["cat"]
    assert versions == {"cat": (entry.document.content.content_hash, "r1", "e1", {"n": 1})}
    stats = index.stats()
    assert (stats.documents, stats.sequence, stats.dimension) == (2, 2, 2)
    assert (stats.embedder_version, stats.searcher, stats.media_bytes) == ("e1", "exact", 3)
    assert stats.database_bytes > 0
    assert index.verify() == []


def test_what_the_caller_changes_later_is_not_the_index_s(index):
    vector, metadata = unit(1, 0), {"n": 1}
    index.upsert([make_entry("a", vector, metadata=metadata)])
    vector[:] = 0
    metadata["n"] = 2
    index.search(unit(1, 0), 1)[0].metadata["n"] = 3  # type: ignore[index]
    (hit,) = index.search(unit(1, 0), 1, Equals("n", 1))
    assert hit.cosine == 1.0
    assert index.verify() == []


def test_deletes_report_unknown_ids_and_are_final(index):
    index.upsert([make_entry("a", unit(1, 0)), make_entry("b", unit(0, 1))])
    assert index.delete(["a", "nobody", "a"]) == (["a"], ["nobody"])
    assert index.delete(["a"]) == ([], ["a"])
    assert [h.id for h in index.search(unit(1, 0), 10)] == ["b"]
    assert index.get(["a"]) == [None]
    assert index.verify() == []


def test_media_live_as_long_as_a_document_names_them(index, tmp_path):
    one, two = Media(b"one").sha256, Media(b"two").sha256
    index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    index.upsert([make_entry("b", unit(0, 1), image=b"one")])
    index.delete(["a"])
    assert _media_files(index, tmp_path) == {one}
    index.upsert([make_entry("b", unit(0, 1), image=b"two")])
    assert _media_files(index, tmp_path) == {two}
    with pytest.raises(PreconditionError):
        index.upsert([make_entry("c", unit(1, 0, 0), image=b"three")])
    assert _media_files(index, tmp_path) == {two}
    index.delete(["b"])
    assert _media_files(index, tmp_path) == set()
    # The last entry of an id wins.
    index.upsert([make_entry("b", unit(0, 1), image=data) for data in (b"one", b"three", b"two")])
    assert _media_files(index, tmp_path) == {two}


def test_media_left_by_a_process_that_died_are_removed_after_the_next_start(tmp_path, index):
    named = Media(b"one").sha256
    index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    orphan = index.media.put(b"never named")
    half = tmp_path / "corpus" / "media" / orphan[:2] / orphan[2:4] / f".{orphan}.ab.tmp"
    half.write_bytes(b"nev")
    assert _media_files(index, tmp_path) == {named, orphan, half.name}
    index.close()
    again = CorpusIndex.open(tmp_path / "corpus")
    again.maintenance.join(30)
    assert _media_files(again, tmp_path) == {named}
    assert again.verify() == []
    assert again.collect_garbage() == 0
    again.close()


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_media_on_an_object_store_live_as_long_as_a_document_names_them(tmp_path, scheme):
    uri = f"{scheme}://{tmp_path / 'objects'}"
    index = CorpusIndex.open(tmp_path / "corpus", media_uri=uri)
    index.upsert([make_entry(id, unit(1, 0), image=b"of " + id.encode()) for id in "abc"])
    index.upsert([make_entry("a", unit(1, 0), image=b"new")])
    index.delete(["b"])
    named = {Media(data).sha256 for data in (b"new", b"of c")}
    assert set(index.media.keys()) == named
    index.media.put(b"never named")
    index.close()
    # Listing an object store costs money: it is done when it is asked for.
    index = CorpusIndex.open(tmp_path / "corpus")
    index.maintenance.join(30)
    assert len(set(index.media.keys())) == 3
    assert index.collect_garbage() == 1
    assert set(index.media.keys()) == named
    assert index.get(["a"])[0].content.media[0].data == b"new"
    assert index.verify() == []
    index.media.remove(Media(b"of c").sha256)
    (problem,) = index.verify()
    assert Media(b"of c").sha256 in problem and "missing" in problem
    index.close()


def test_media_of_writes_that_are_under_way_are_not_garbage(index, tmp_path, monkeypatch):
    collecting = threading.Event()
    put = index.media.put

    def slow_put(data):
        sha256 = put(data)
        collecting.set()
        time.sleep(0.2)  # the collector must wait for the row
        return sha256

    monkeypatch.setattr(index.media, "put", slow_put)
    writer = threading.Thread(
        target=lambda: index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    )
    writer.start()
    assert collecting.wait(30)
    assert index.collect_garbage() == 0
    writer.join(30)
    assert _media_files(index, tmp_path) == {Media(b"one").sha256}


def test_damaged_media_are_data_loss_and_verify_names_them(index, tmp_path):
    index.upsert([make_entry("a", unit(1, 0), image=b"one"), make_entry("b", unit(0, 1))])
    sha256 = Media(b"one").sha256
    (file,) = (p for p in (tmp_path / "corpus" / "media").rglob(sha256))
    file.write_bytes(b"oNe")
    with pytest.raises(DataLossError, match=sha256):
        index.get(["b", "a"])
    assert index.get(["b"])[0] is not None
    assert [sha256 in problem for problem in index.verify()] == [True]
    assert index.verify(media=False) == []


def test_answers_too_large_for_one_message_are_refused_before_reading(index):
    index.upsert([make_entry(id, unit(1, 0), image=id.encode() * 500) for id in "ab"])
    with pytest.raises(InvalidInputError, match="1000 bytes") as caught:
        index.fetch(["a", "b"], max_media_bytes=999)
    assert caught.value.reason == "RESPONSE_TOO_LARGE"
    assert len(index.fetch(["a", "b"], max_media_bytes=1000)) == 2
    assert len(index.fetch(["a", "b"], max_media_bytes=0, omit_media=True)) == 2


@pytest.mark.parametrize(
    "vector",
    [np.zeros(2), np.array([np.nan, 1.0]), np.array([np.inf, 1.0]), np.eye(2), np.zeros(0)],
)
def test_bad_query_vectors(index, vector):
    index.upsert([make_entry("a", unit(1, 0))])
    with pytest.raises(InvalidInputError) as caught:
        index.search(vector, 1)
    assert caught.value.field == "vector"


def test_bad_k_ids_and_dimension(index):
    index.upsert([make_entry("a", unit(1, 0))])
    with pytest.raises(InvalidInputError):
        index.search(unit(1, 0), 0)
    with pytest.raises(PreconditionError, match="dimension 3.*dimension 2"):
        index.search(unit(1, 0, 0), 1)
    with pytest.raises(InvalidInputError):
        index.get([""])
    with pytest.raises(InvalidInputError):
        index.delete(["a", "\ud800"])
    assert index.search(unit(1, 0), 1)[0].id == "a"


def test_a_full_disk_changes_nothing_that_is_visible(index):
    index.upsert([make_entry("a", unit(1, 0))])
    writer = index.store._writer
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageFullError):
        index.upsert([make_entry(f"b{i}", unit(0, 1), text="x" * 4000) for i in range(20)])
    assert [h.id for h in index.search(unit(0, 1), 50)] == ["a"]
    assert index.verify() == []


def test_reopening_finds_everything(tmp_path):
    rng = np.random.default_rng(0)
    vectors = random_units(rng, 60, 8)
    index = CorpusIndex.open(tmp_path)
    index.upsert([make_entry(f"d{i}", vectors[i], metadata={"i": i}) for i in range(40)])
    report = index.snapshot()
    assert report.sequence == 40
    assert report.bytes > 40 * 8 * 4
    index.upsert([make_entry(f"d{i}", vectors[i], metadata={"i": i}) for i in range(30, 60)])
    index.delete([f"d{i}" for i in range(10)])
    expected = index.search(vectors[50], 100)
    index.close()
    with pytest.raises(UnavailableError):
        index.search(vectors[0], 1)

    index = CorpusIndex.open(tmp_path)
    assert index.stats().snapshot_sequence == 40
    assert index.stats().sequence == 80
    assert index.search(vectors[50], 100) == expected
    assert index.verify() == []
    index.close()


def _three_generations(path) -> None:
    index = CorpusIndex.open(path)
    rng = np.random.default_rng(1)
    vectors = random_units(rng, 30, 8)
    index.upsert([make_entry(f"d{i}", vectors[i]) for i in range(10)])
    index.snapshot()
    index.upsert([make_entry(f"d{i}", vectors[i]) for i in range(10, 20)])
    index.delete(["d3"])
    index.snapshot()
    index.upsert([make_entry(f"d{i}", vectors[i]) for i in range(20, 30)])
    index.delete(["d4", "d15"])
    index.close()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path):
    raw = bytearray(path.read_bytes())
    # In the manifest the third byte from the end closes the inner object.
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("file", ["vectors.npy", "sequences.npy", "ids.json", "manifest.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.unlink()])
def test_a_torn_snapshot_is_skipped_with_a_warning(tmp_path, caplog, file, damage):
    _three_generations(tmp_path)
    newest = max((tmp_path / "snapshots").iterdir())
    damage(newest / file)
    (tmp_path / "snapshots" / ".half.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        index = CorpusIndex.open(tmp_path)
    assert f"skipping snapshot {newest}" in caplog.text
    assert index.stats().snapshot_sequence == 10
    assert index.verify() == []
    assert index.stats().documents == 27
    index.snapshot()
    assert not (tmp_path / "snapshots" / ".half.tmp").exists()
    index.close()


def test_a_snapshot_replaced_while_its_size_is_asked_counts_nothing(index, monkeypatch, tmp_path):
    index.upsert([make_entry("a", unit(1, 0))])
    size = index.snapshot().bytes
    assert size > 0
    before = index.stats().database_bytes
    listed = snapshots.listed
    monkeypatch.setattr(snapshots, "listed", lambda root: [*listed(root), tmp_path / "just gone"])
    assert index.stats().database_bytes == before


def test_with_every_snapshot_torn_the_database_is_enough(tmp_path, caplog):
    _three_generations(tmp_path)
    for snapshot in (tmp_path / "snapshots").iterdir():
        (snapshot / "manifest.json").write_text("{")
    index = CorpusIndex.open(tmp_path)
    assert index.stats().snapshot_sequence == 0
    assert index.verify() == []
    assert len(index.search(unit(*range(1, 9)), 100)) == 27
    index.close()


def test_snapshots_of_another_corpus_or_of_the_future_are_not_used(tmp_path, caplog):
    _three_generations(tmp_path / "a")
    index = CorpusIndex.open(tmp_path / "b")
    index.upsert([make_entry("only", unit(*range(1, 9)))])
    index.close()
    (tmp_path / "a" / "snapshots").rename(tmp_path / "b" / "snapshots")
    index = CorpusIndex.open(tmp_path / "b")
    assert "belongs to corpus" in caplog.text
    assert [h.id for h in index.search(unit(*range(1, 9)), 9)] == ["only"]
    index.close()


def _plant(index: CorpusIndex, rows: Rows, *, known: bool) -> None:
    """Put a snapshot of the last write there, with right checksums."""
    sequence = index.store.sequence
    path = snapshots.write(
        index.store.path / "snapshots",
        rows,
        corpus_id=index.store.corpus_id,
        sequence=sequence,
        known={},
    )
    if known:
        digests = index.store.snapshot_digests() | {sequence: snapshots.digest(path)}
        index.store.record_snapshots(digests)


def test_a_tampered_snapshot_with_right_checksums_is_not_used(tmp_path, caplog):
    _three_generations(tmp_path)
    index = CorpusIndex.open(tmp_path)
    index.snapshot()
    rows = index.vectors.live.view.gather()
    # Only a vector is another one: ids and sequences agree with the database.
    _plant(index, Rows(rows.ids, rows.vectors[::-1], rows.sequences, []), known=False)
    index.close()
    index = CorpusIndex.open(tmp_path)
    assert "not the one that this corpus wrote" in caplog.text
    assert index.verify() == []
    # The next snapshot of the same write replaces it instead of trusting it.
    index.snapshot()
    index.close()
    caplog.clear()
    index = CorpusIndex.open(tmp_path)
    assert "skipping" not in caplog.text
    assert index.stats().snapshot_sequence == index.stats().sequence
    assert index.verify() == []
    index.close()


def test_a_snapshot_that_contradicts_the_database_is_not_used(tmp_path, caplog):
    _three_generations(tmp_path)
    index = CorpusIndex.open(tmp_path)
    rows = index.vectors.live.view.gather()
    # Whole and with right checksums, but a deleted document lives in it and a live one does not.
    wrong = Rows(["d3", *rows.ids[1:]], rows.vectors, rows.sequences, rows.metadata)
    _plant(index, wrong, known=True)
    index.close()
    index = CorpusIndex.open(tmp_path)
    assert "contradicts the database" in caplog.text
    assert index.verify() == []
    assert "d3" not in {h.id for h in index.search(unit(*range(1, 9)), 100)}
    index.close()


def test_only_two_snapshots_are_kept_and_tombstones_older_than_both_are_dropped(tmp_path):
    index = CorpusIndex.open(tmp_path)
    for i in range(5):
        index.upsert([make_entry(f"d{i}", unit(1, i)), make_entry(f"x{i}", unit(1, -i))])
        index.delete([f"x{i}"])
        index.snapshot()
    assert [int(p.name) for p in sorted((tmp_path / "snapshots").iterdir())] == [12, 15]
    assert index.store.horizon == 12
    assert [c.sequence for c in index.store.changes_since(0)] == [1, 4, 7, 10, 13, 15]
    index.close()
    index = CorpusIndex.open(tmp_path)
    assert index.verify() == []
    assert index.stats().documents == 5
    index.close()


def test_maintenance_rebuilds_and_snapshots_by_itself(tmp_path):
    config = IndexConfig(exact_below=300, delta_rows=50, delta_share=0.1)
    index = CorpusIndex.open(tmp_path, config=config, snapshot_every=200)
    rng = np.random.default_rng(2)
    vectors = random_units(rng, 600, 16)
    for start in range(0, 600, 50):
        index.upsert([make_entry(f"d{i}", vectors[i]) for i in range(start, start + 50)])
    index.maintenance.join(30)
    stats = index.stats()
    assert stats.last_error == ""
    assert stats.generation > 1
    assert stats.snapshot_sequence >= 200
    index.rebuild()
    assert index.stats().searcher == "scann-ah"
    assert index.verify() == []
    index.close()
    # A large corpus serves exactly at once and gets its searcher in the background.
    index = CorpusIndex.open(tmp_path, config=config)
    assert index.search(vectors[3], 1)[0].id == "d3"
    index.maintenance.join(30)
    assert index.stats().searcher == "scann-ah"
    assert index.stats().canary_recall >= 0.95
    index.close()


def test_recall_on_real_queries_is_measured_and_reported(tmp_path):
    config = IndexConfig(exact_below=300, check_every=20, canaries=16, checked_queries=16)
    index = CorpusIndex.open(tmp_path, config=config)
    rng = np.random.default_rng(4)
    vectors = random_units(rng, 400, 16)
    index.upsert([make_entry(f"d{i}", vectors[i], metadata={"n": i % 4}) for i in range(400)])
    index.rebuild()
    assert index.stats().searcher == "scann-ah"
    assert (index.stats().query_recall, index.stats().checked_queries) == (1.0, 0)
    for query in random_units(rng, 25, 16):
        index.search(query, 5, Equals("n", 1))
    index.maintenance.join(30)
    stats = index.stats()
    assert stats.query_recall >= 0.95
    assert stats.checked_queries == 16
    index.close()


def test_failed_maintenance_is_reported_and_serving_goes_on(tmp_path, monkeypatch, caplog):
    index = CorpusIndex.open(tmp_path, config=IndexConfig(delta_rows=2))

    def fail():
        raise StorageFullError("no space left for the test")

    monkeypatch.setattr(index.vectors.live, "rebuild", fail)
    index.upsert([make_entry(f"d{i}", unit(1, i)) for i in range(5)])
    index.maintenance.join(30)
    assert index.stats().last_error == "no space left for the test"
    assert index.search(unit(1, 0), 1)[0].id == "d0"
    index.close()


def test_the_corpus_remembers_where_its_media_are(tmp_path):
    uri = f"memory://media-{tmp_path.name}"
    index = CorpusIndex.open(tmp_path / "c", media_uri=uri)
    index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    index.close()
    index = CorpusIndex.open(tmp_path / "c")
    assert index.media.uri == uri
    assert index.get(["a"])[0].content.media[0].data == b"one"
    index.close()


def test_a_corpus_can_be_moved(tmp_path):
    index = CorpusIndex.open(tmp_path / "old")
    index.upsert([make_entry("a", unit(1, 0), image=b"one")])
    index.close()
    (tmp_path / "old").rename(tmp_path / "new")
    index = CorpusIndex.open(tmp_path / "new")
    assert index.get(["a"])[0].content.media[0].data == b"one"
    assert index.verify() == []
    index.close()
