"""Reading examples: JSON lines, Arrow and Parquet, the published mix, drawings; and their order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.drawings import emoji_data
from training.builtin import texts
from training.data.columns import Columns, ColumnSource, data_files
from training.data.ecrs import PLAIN, TRUTH, Ecr, EcrStore, WithEcrs, ecr_key
from training.data.emoji_examples import EmojiSource
from training.data.jsonl import JsonlSource
from training.data.mixture import Mixture, Weighted, by_dataset
from training.data.mmeb import mixture
from training.data.order import BatchOrder, read_steps
from training.data.rows import RowSource
from training.data.sources import open_source
from tte_jax.content import Content, Side
from tte_jax.errors import (
    DataLossError,
    InvalidInputError,
    NotFoundError,
    UnsupportedError,
)

PICTURE = b"\x89PNG picture "


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines_at_random(tmp_path):
    (tmp_path / "owl.png").write_bytes(PICTURE)
    rows = [
        {"key": f"q{i}", "query": f"owl {i}", "positives": [{"images": ["owl.png"], "ecr": "e"}]}
        for i in range(5)
    ]
    rows[3] |= {
        "dataset": "other",
        "group": "g",
        "query": {"text": "ü", "instruction": "Find.", "ecr": "x"},
        "negatives": ["hawk", "crow"],
        "negative_scores": [0.25, 0.5],
        "positive_score": 1,
    }
    path = tmp_path / "birds.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    source = JsonlSource(path)
    assert len(source) == 5
    one = source[3]
    assert (one.key, one.dataset, one.group) == ("q3", "other", "g")
    assert (one.query.content.text, one.query.instruction, one.query.ecr) == ("ü", "Find.", "x")
    assert [d.content.text for d in one.negatives] == ["hawk", "crow"]
    assert (one.negative_scores, one.positive_score) == ((0.25, 0.5), 1.0)
    assert source[0].dataset == "birds"
    assert source[0].positives[0].content == Content.of("", PICTURE)
    assert source[0].positives[0].key == source[4].positives[0].key
    assert source[0].positives[0].key == Content.of("", PICTURE).content_hash
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"query": "a", "positives": ["b"], "postives": []}', "postives"),
        ('{"query": "", "positives": ["b"]}', "neither text nor media"),
        ('{"query": "a", "positives": []}', "no positive"),
        ('{"query": "a", "positives": ["b"], "negatives": [""]}', "negatives[0]"),
        ('{"query": "a", "positives": ["b"], "negatives": ["c"], "negative_scores": [1, 2]}', "2"),
        ('{"query": {"image": "x"}, "positives": ["b"]}', "'image'"),
        ('{"query": {"images": "x.png"}, "positives": ["b"]}', "images to be a list"),
        ('{"query": {"pages": [{"path": "x", "page": "3"}]}, "positives": ["b"]}', "whole number"),
        ('{"query": "a", "positives": ["b"], "negatives": ["c"], "negative_scores": 1}', "a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, word):
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "a", "positives": ["b"]}\n' + line + "\n")
    with pytest.raises(InvalidInputError, match="x.jsonl:2") as raised:
        JsonlSource(path).row(1)
    assert word in raised.value.message


def test_missing_and_empty_media_say_which(tmp_path):
    row = {"query": "a", "positives": [{"images": ["gone.png"]}]}
    source = JsonlSource(write_jsonl(tmp_path / "x.jsonl", [row]))
    with pytest.raises(NotFoundError, match="gone.png"):
        source[0]
    (tmp_path / "gone.png").touch()
    with pytest.raises(DataLossError, match="empty"):
        source[0]


def hugging_face_table() -> pa.Table:
    return pa.table(
        {
            "query": ["cat", "dog", "owl"],
            "positive": [["a cat"], ["a dog", "a puppy"], ["an owl"]],
            "positive_image": [[None], [None, {"bytes": PICTURE, "path": None}], [None]],
            "negative": [["hawk", ""], [], None],
            "group": ["1", "", None],
        }
    )


def test_saved_by_hugging_face(tmp_path):
    """The layout of `save_to_disk`: Arrow streams, named by state.json."""
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    table = hugging_face_table()
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        with pa.OSFile(str(folder / f"data-{number}.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(part)
    names = [{"filename": f"data-{i}.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    source = open_source(f"hf:{tmp_path}/set?dataset=animals")
    assert [source[i].query.content.text for i in range(3)] == ["cat", "dog", "owl"]
    assert source[2].dataset == "animals"
    assert [d.content for d in source[1].positives] == [
        Content.of("a dog"),
        Content.of("a puppy", PICTURE),
    ]
    assert [d.content.text for d in source[0].negatives] == ["hawk"]
    assert [source[i].group for i in range(3)] == ["1", "", ""]


def test_parquet_becomes_arrow_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TTE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "train-00000.parquet"
    pq.write_table(hugging_face_table(), file)
    source = ColumnSource(data_files(tmp_path), "animals")
    (cached,) = (tmp_path / "cache/arrow").iterdir()
    made = cached.stat().st_mtime_ns
    again = ColumnSource(data_files(tmp_path), "animals")
    assert cached.stat().st_mtime_ns == made
    assert source[1] == again[1] and source[1].query.content.text == "dog"
    with pytest.raises(InvalidInputError, match="'caption'"):
        ColumnSource([file], "x", columns=Columns(query="caption", query_image="picture"))
    with pytest.raises(NotFoundError, match="'test'"):
        data_files(tmp_path, "test")


def test_a_split_takes_no_other_splits_files(tmp_path):
    mine = ["train.parquet", "train-00000-of-00002.parquet", "train_0.arrow", "train.1.parquet"]
    others = ["train_hard-00000.parquet", "training_notes.parquet", "test-0.parquet", "train.txt"]
    for name in mine + others:
        (tmp_path / name).touch()
    assert [p.name for p in data_files(tmp_path, "train") if p.name not in mine] == []
    assert sorted(p.name for p in data_files(tmp_path, "train")) == sorted(mine)
    (tmp_path / "unseen").mkdir()
    (tmp_path / "unseen" / "0000.parquet").touch()
    assert [p.name for p in data_files(tmp_path, "unseen")] == ["0000.parquet"]


def write_mix(root: Path) -> Path:
    placed = "<|image_1|>\nWhat is it?"
    vqa = {
        "qry": [placed, placed, "", placed],
        "qry_image_path": ["i/0.png", "i/1.png", "", "i/3.png"],
        "pos_text": ["cat", "dog", "owl", "fox"],
        "pos_image_path": ["", "", "", ""],
        "neg_text": ["dog", "", "x", "cow"],
        "neg_image_path": ["", "", "", ""],
        "qry_ecr": ["<think>fur</think>\nAnswer: cat", "", "", ""],
    }
    find = {
        "qry": ["find a cat", "find a dog"],
        "qry_image_path": ["", ""],
        "pos_text": ["<|image_1|>", "<|image_1|>"],
        "pos_image_path": ["i/0.png", "i/1.png"],
        "neg_text": [["<|image_1|>", "<|image_1|>"], [""]],
        "neg_image_path": [["i/1.png", "i/3.png"], [""]],
    }
    for name, columns in (("VQA", vqa), ("Find", find)):
        folder = root / "org/MMEB-train" / name
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "original-00000-of-00001.parquet")
    (root / "org/MMEB-train/i").mkdir()
    for number in range(4):
        (root / f"org/MMEB-train/i/{number}.png").write_bytes(PICTURE + bytes([number]))
    path = root / "mix.yaml"
    path.write_text(
        "VQA:\n  dataset_parser: mmeb\n  dataset_name: org/MMEB-train\n  subset_name: VQA\n"
        "  dataset_split: original\n  image_dir: org/MMEB-train\n  weight: 2\n"
        "Find:\n  dataset_parser: mmeb_neg\n  dataset_name: org/MMEB-train\n"
        "  subset_name: Find\n  dataset_split: original\n  num_sample_per_subset: 1\n"
    )
    return path


def test_the_published_mix_with_its_negatives(tmp_path, monkeypatch):
    monkeypatch.setenv("TTE_CACHE", str(tmp_path / "cache"))
    mix = mixture(write_mix(tmp_path))
    assert [(p.name, len(p.source), p.weight) for p in mix.parts] == [("VQA", 3, 2), ("Find", 1, 1)]
    first, second, third, found = (mix[i] for i in range(4))
    assert first.query.content == Content.of("What is it?", PICTURE + b"\0")
    assert first.query.ecr.endswith("Answer: cat") and second.query.ecr == ""
    assert [d.content.text for d in first.negatives] == ["dog"]
    assert second.negatives == ()
    # The row without a query is left out, as the published trainer does.
    assert third.positives[0].content.text == "fox"
    assert found.dataset == "Find" and found.positives[0].content == Content.of("", PICTURE + b"\0")
    assert [d.content.media[0].data[-1] for d in found.negatives] == [1, 3]


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("A:\n  dataset_parser: vidore\n", UnsupportedError, "vidore"),
        ("A:\n  dataset_name: org/none\n", NotFoundError, "hf download"),
        ("A:\n  dataset_name: org/MMEB-train\n  weight: 0\n", InvalidInputError, "weight"),
        ("A:\n  dataset_name: org/MMEB-train\n  wieght: 1\n", InvalidInputError, "wieght"),
        ("[1]", InvalidInputError, "mapping"),
        ("A: {", InvalidInputError, "not YAML"),
    ],
)
def test_a_mix_that_cannot_be_read(tmp_path, text, error, word):
    write_mix(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(error, match=word):
        mixture(tmp_path / "bad.yaml")


def test_drawings_as_examples():
    data = emoji_data(side=16)
    data.masks["train"][3] = False
    concepts = {c.key: c for c in data.concepts}
    held_out = data.images[3].tobytes()
    for kind in ("text", "image", "composed"):
        source = EmojiSource(data, kind, 40, seed=1)
        again = EmojiSource(data, kind, 40, seed=1)
        shown = 0
        for i in reversed(range(40)):
            one = source[i]
            assert one == again[i] and one.dataset == f"emoji-{kind}"
            wanted = concepts[one.group.removeprefix("emoji:")]
            row = source.row(i)
            for item in (row.query, *row.positives):
                for media in item.media:
                    shown += 1
                    assert held_out not in _pixels(media.data)
            if kind == "composed":
                assert one.query.content.text and len(one.query.content.media) == 1
                assert wanted.gender != "none"
            if kind == "image":
                # Noto and OpenMoji draw every concept here, so the other one is the answer.
                left_out = wanted.key == data.concepts[data.concept_ids[3]].key
                assert left_out or one.positives[0].content != one.query.content
        assert shown >= 40
    told = EmojiSource(data, "text", 5, truth=True)[0]
    wanted = concepts[told.group.removeprefix("emoji:")]
    assert told.positives[0].ecr.endswith(f"Answer: {texts.label(wanted)}")
    assert told.query.ecr == told.positives[0].ecr
    with pytest.raises(InvalidInputError, match="family"):
        EmojiSource(data, "composed", 5, group="family")
    # Only one family, whatever is asked for; another seed draws another one in the end.
    drawn = set()
    for seed in range(8):
        few = EmojiSource(data, "text", 12, seed=seed, families=1)
        of = {concepts[few[i].group.removeprefix("emoji:")].family for i in range(12)}
        assert len(of) == 1
        drawn |= of
    assert len(drawn) > 1


def _pixels(data: bytes | None) -> bytes:
    import io

    from PIL import Image

    assert data
    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


class Numbers(RowSource):
    def __init__(self, folder: Path, name: str, count: int) -> None:
        rows = [{"key": f"{name}{i}", "query": "q", "positives": [f"{i}"]} for i in range(count)]
        self._inner = JsonlSource(write_jsonl(folder / f"{name}.jsonl", rows))

    def __len__(self) -> int:
        return len(self._inner)

    def row(self, index: int):
        return self._inner.row(index)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    return Mixture(
        [Weighted("a", Numbers(folder, "a", 30), 3.0), Weighted("b", Numbers(folder, "b", 11), 1.0)]
    )


def test_order_is_of_seed_and_step_alone(numbers):
    order = BatchOrder(numbers, global_batch=16, sub_batch=4, seed=5)
    steps = [order.step(s) for s in range(40)]
    other = BatchOrder(numbers, global_batch=16, sub_batch=4, seed=5)
    for s in (39, 3, 17):  # in any order, without the steps before
        np.testing.assert_array_equal(other.step(s), steps[s])
    assert not np.array_equal(
        BatchOrder(numbers, global_batch=16, sub_batch=4, seed=6).step(0), steps[0]
    )
    for hosts in (1, 2, 8):
        shares = [order.share(7, host, hosts) for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(shares), steps[7])
    with pytest.raises(InvalidInputError, match="divisor"):
        order.share(0, 0, 3)


def test_sub_batches_are_of_one_data_set_by_weight(numbers):
    order = BatchOrder(numbers, global_batch=16, sub_batch=4, seed=0)
    subs = np.concatenate([order.step(s) for s in range(40)]).reshape(-1, 4)
    part = subs >= 30
    assert (part.all(1) | (~part).all(1)).all()
    assert Counter(part[:, 0].tolist()) == {False: 120, True: 40}
    assert all(len(set(sub)) == 4 for sub in subs.tolist())
    # An epoch of `a` is 7 sub-batches: none of its examples comes twice in one, and over many
    # epochs all of them come.
    of_a = subs[~part[:, 0]]
    for start in range(0, 119, 7):
        epoch = of_a[start : start + 7].ravel()
        assert len(set(epoch.tolist())) == len(epoch)
    assert set(of_a.ravel().tolist()) == set(range(30))
    assert (of_a[:7] != of_a[7:14]).any()
    with pytest.raises(InvalidInputError, match="11 examples, fewer than a sub-batch of 12"):
        BatchOrder(numbers, global_batch=12, sub_batch=12)


def test_reading_goes_on_where_it_stopped(numbers):
    order = BatchOrder(numbers, global_batch=8, sub_batch=4)

    def keys(step: int, count: int, host: int = 0, hosts: int = 1) -> list[list[str]]:
        reader = read_steps(numbers, order, step=step, host=host, hosts=hosts, threads=2)
        got = [next(reader) for _ in range(count)]
        assert [s for s, _ in got] == list(range(step, step + count))
        return [[e.key for e in examples] for _, examples in got]

    whole = keys(0, 6)
    assert keys(0, 2) + keys(2, 4) == whole
    # One host before, two after.
    halves = zip(keys(2, 4, 0, 2), keys(2, 4, 1, 2), strict=True)
    assert keys(0, 2) + [a + b for a, b in halves] == whole


def test_a_file_of_several_data_sets_is_taken_apart(tmp_path):
    rows = [{"dataset": "xy"[i % 2], "query": f"{i}", "positives": ["p"]} for i in range(7)]
    mix = by_dataset(JsonlSource(write_jsonl(tmp_path / "m.jsonl", rows)))
    assert [(p.name, len(p.source), p.weight) for p in mix.parts] == [("x", 4, 4), ("y", 3, 3)]
    assert [mix[i].query.content.text for i in range(7)] == list("0246135")


def test_ecrs_are_kept_by_content_and_arm(tmp_path):
    rows = [{"query": f"q{i}", "positives": ["same"]} for i in range(2)]
    source = JsonlSource(write_jsonl(tmp_path / "m.jsonl", rows))
    path = tmp_path / "ecrs.jsonl"
    store = EcrStore(path, arm=PLAIN, model="m@1", budget=8)
    query, target = source[0].query, source[0].positives[0]
    made = [
        Ecr(ecr_key(query, Side.QUERY), Side.QUERY, PLAIN, query.key, "of q0", "m@1", 8),
        Ecr(ecr_key(target, Side.DOCUMENT), Side.DOCUMENT, PLAIN, target.key, "of t", "m@1", 8),
    ]
    store.append(made)
    store.append(made)  # what is there is not written again
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    told = WithEcrs(source, EcrStore(path))
    assert [told[i].query.ecr for i in range(2)] == ["of q0", ""]
    assert [told[i].positives[0].ecr for i in range(2)] == ["of t", "of t"]
    assert ecr_key(query, Side.QUERY) != ecr_key(query, Side.QUERY, "t")
    # One picture that is asked two things has two reasonings, and what nobody reasoned has none.
    asked = [{"text": "p", "instruction": f"Do {i}."} for i in range(3)]
    rows = [{"query": one, "positives": ["same"]} for one in asked]
    source = JsonlSource(write_jsonl(tmp_path / "asked.jsonl", rows))
    store = EcrStore(tmp_path / "asked", arm=PLAIN, model="m@1", budget=8)
    for i in (1, 0):
        one = source[i].query
        key = ecr_key(one, Side.QUERY)
        store.append([Ecr(key, Side.QUERY, PLAIN, one.key, f"for {i}", "m@1", 8)])
    told = WithEcrs(source, store)
    assert [told[i].query.ecr for i in range(3)] == ["for 0", "for 1", ""]

    path.write_bytes(whole + b'{"key": "torn')
    assert len(EcrStore(path)) == 2  # a reader leaves it, a writer cuts it off
    EcrStore(path, arm=PLAIN, model="m@1", budget=8)
    assert path.read_bytes() == whole
    for changed in ({"arm": TRUTH}, {"model": "m@2"}, {"budget": 9}):
        with pytest.raises(InvalidInputError, match="another file"):
            EcrStore(path, **({"arm": PLAIN, "model": "m@1", "budget": 8} | changed))
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataLossError, match=":1 is no ECR"):
        EcrStore(path)
    with pytest.raises(NotFoundError, match="training.reason"):
        EcrStore(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "spec", ["birds.jsonl", "csv:x", "jsonl:", "jsonl:x?rows=1", "emoji:x?text=many"]
)
def test_a_source_that_cannot_be_named_so(tmp_path, spec):
    with pytest.raises((InvalidInputError, NotFoundError)):
        open_source(spec)
