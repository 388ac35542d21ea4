"""What `tte data check` finds, and what it leaves alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.training.test_data_sources import write_jsonl
from training.data import check
from training.data.ecrs import PLAIN, Ecr, EcrStore, ecr_key
from training.data.jsonl import JsonlSource
from training.data.sources import open_source
from tte_jax.cli.app import app
from tte_jax.content import Side


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 3), colour).save(out, "PNG")
    return out.getvalue()


def found(path: Path, rows: list[dict], **options) -> dict[str, list[str]]:
    source = JsonlSource(write_jsonl(path / "x.jsonl", rows))
    return check.check(source, **options).shown


GOOD = [
    {"key": "1", "query": "a bird of the night", "positives": ["owl"], "group": "owl"},
    {"key": "2", "query": "it barks", "positives": ["dog"], "negatives": ["cat", "owl"]},
    # A letter alone is no leak: it stands in nearly every text.
    {"key": "3", "query": "A or B?", "positives": ["A"]},
    # "cat" is in "catalogue", but not as a word.
    {"key": "4", "query": "the catalogue", "positives": ["cat"]},
]


def test_nothing_is_found_in_good_data(tmp_path):
    assert found(tmp_path, GOOD) == {}


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([{"query": "", "positives": ["b"]}], "invalid_row"),
        ([{"query": "a", "positives": [{"images": ["gone.png"]}]}], "missing_media"),
        ([{"query": "a", "positives": [{"images": ["empty.png"]}]}], "missing_media"),
        ([{"query": "a", "positives": [{"videos": ["frames"]}]}], "missing_media"),
        ([{"key": "1", "query": "c", "positives": ["d"]}], "repeated_key"),
        ([{"query": "it barks", "positives": ["dog"]}], "duplicate_example"),
        ([{"query": "c", "positives": ["d"], "negatives": ["d"]}], "negative_is_target"),
        (
            [{"query": "c", "positives": ["d"], "negatives": ["owl"], "group": "owl"}],
            "negative_is_target",
        ),
        ([{"query": "Is it a Polar Bear?", "positives": ["polar bear"]}], "target_in_query"),
        (
            [{"query": {"text": "c", "ecr": "Answer: a fox."}, "positives": ["fox"]}],
            "target_in_ecr",
        ),
        ([{"query": "it barks", "positives": ["puppy"]}], "ambiguous_query"),
        ([{"query": "man's best friend", "positives": ["dog"]}], "shared_target"),
    ],
)
def test_each_finding(tmp_path, rows, finding):
    (tmp_path / "empty.png").touch()
    (tmp_path / "frames").mkdir()
    rows = [{"key": f"bad{i}", **row} for i, row in enumerate(rows)]
    assert set(found(tmp_path, GOOD + rows)) == {finding}
    # It is the added row that is named, beside the one that it meets.
    (places,) = found(tmp_path, GOOD + rows).values()
    assert rows[0]["key"] in places[0] or finding == "invalid_row"


def test_a_negative_is_a_right_answer_in_another_row(tmp_path):
    rows = [
        {"key": "1", "query": "it barks", "positives": ["fox"], "negatives": ["dog", "cat"]},
        {"key": "2", "query": "it barks", "positives": ["dog"]},
        {"key": "3", "query": {"text": "it barks", "instruction": "Draw."}, "positives": ["cat"]},
    ]
    shown = found(tmp_path, rows)
    assert shown["negative_is_target"] == ["x/1"]
    assert set(shown) == {"negative_is_target", "ambiguous_query"}
    # The same in the other order, and without it nothing to say of a negative.
    assert found(tmp_path, rows[1::-1])["negative_is_target"] == ["x/1"]
    assert "negative_is_target" not in found(tmp_path, rows[::2])


def test_a_group_joins_what_belongs_together(tmp_path):
    rows = [
        {"key": str(i), "query": q, "positives": [p], "group": "dog"}
        for i, (q, p) in enumerate([("it barks", "dog"), ("it barks", "puppy"), ("pet", "dog")])
    ]
    assert found(tmp_path, rows) == {}


def test_truncated_images_are_found_when_they_are_opened(tmp_path):
    (tmp_path / "whole.png").write_bytes(png("red"))
    (tmp_path / "torn.png").write_bytes(png("red")[:-30])
    rows = [{"query": "c", "positives": [{"images": ["whole.png"]}]}]
    rows += [{"query": "d", "positives": [{"images": ["torn.png"]}]}]
    assert found(tmp_path, rows) == {}
    (places,) = found(tmp_path, rows, decode=True).values()
    assert len(places) == 1 and "torn.png" in places[0]


def test_overlap_with_an_evaluation_is_of_contents(tmp_path):
    for name, colour in (("a.png", "red"), ("copy.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    rows = [
        {"key": "same query", "query": {"images": ["a.png"], "text": "?"}, "positives": ["x"]},
        {"key": "same target", "query": "c", "positives": [{"images": ["a.png"]}]},
        {"key": "neither", "query": {"images": ["b.png"], "text": "?"}, "positives": ["y"]},
    ]
    test = [
        {"query": {"images": ["copy.png"], "text": "?"}, "positives": ["z"]},
        {"query": "another", "positives": [{"images": ["copy.png"]}]},
    ]
    evaluation = JsonlSource(write_jsonl(tmp_path / "test.jsonl", test))
    shown = found(tmp_path, rows, evaluation=evaluation)
    assert shown == {"eval_query": ["x/same query"], "eval_target": ["x/same target"]}


def test_ecrs_of_a_store_are_checked_too(tmp_path):
    source = JsonlSource(write_jsonl(tmp_path / "x.jsonl", GOOD))
    store = EcrStore(tmp_path / "ecrs.jsonl", arm=PLAIN, model="m", budget=8)
    query = source[1].query
    key = ecr_key(query, Side.QUERY)
    store.append([Ecr(key, Side.QUERY, PLAIN, query.key, "Answer: dog", "m", 8)])
    told = open_source(f"jsonl:{tmp_path}/x.jsonl?ecrs={tmp_path}/ecrs.jsonl")
    assert check.check(told).shown == {"target_in_ecr": ["x/2: 'dog'"]}


def test_command_and_exit_codes(tmp_path, capfd):
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    write_jsonl(tmp_path / "bad.jsonl", [*GOOD, GOOD[1] | {"key": "5"}])

    def run(*arguments: str) -> tuple[int, str, str]:
        code = CliRunner().invoke(app, ["data", "check", *arguments]).exit_code
        return code, *capfd.readouterr()

    code, out, _ = run(f"jsonl:{tmp_path}/bad.jsonl", "--json")
    assert code == 1
    said = json.loads(out)
    assert said["examples"] == 5 and said["errors"] == 1
    assert said["findings"]["duplicate_example"]["first"] == ["bad/5"]
    code, out, _ = run(f"jsonl:{tmp_path}/bad.jsonl", "--allow", "duplicate_example")
    assert code == 0 and "note  duplicate_example: 1" in out


def test_exit_codes_of_what_cannot_be_read(tmp_path, capsys):
    good = write_jsonl(tmp_path / "good.jsonl", GOOD)
    assert check.main([f"jsonl:{good}"]) == 0
    assert check.main([f"jsonl:{tmp_path}/none.jsonl"]) == 3
    assert check.main(["none.jsonl", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]
    assert check.main([f"jsonl:{good}", "--eval", f"jsonl:{good}"]) == 1
