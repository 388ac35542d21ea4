"""mini-MMEB: the benchmark's layout, the same on every machine, checked against its manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.evaluation import mini
from tte_jax.evaluation.mmeb_v2.load import load, what_is_missing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mini")
    mini.build(place, queries=3)
    return place


@pytest.mark.parametrize("info", mini.DATASETS, ids=lambda info: info.name)
def test_the_benchmarks_reader_reads_it(info: mini.DatasetInfo, folder: Path) -> None:
    assert what_is_missing([info], folder) == []
    task = load(info, folder)
    assert len(task.queries) == 3
    names = {item.name for item in task.candidates()}
    for query in task.queries:
        assert query.pool is not None and set(query.pool) == names
        assert not query.load().empty and query.instruction
    assert len(names) == (15 if info.name == "mini-composed" else 3)


def test_composed_asks_for_one_tone_of_the_same_concept(folder: Path) -> None:
    info = next(d for d in mini.DATASETS if d.name == "mini-composed")
    query = load(info, folder).queries[1]
    assert query.load().text == "the same, but with medium-light skin tone"
    assert "1F3FC" in query.label[0]


def test_a_build_is_repeatable_and_checked(folder: Path, tmp_path: Path) -> None:
    again = mini.build(tmp_path, queries=3)
    # Parquet files carry their writer's version; pictures and rows are the same here.
    assert again == mini.build(folder, queries=3)
    with pytest.raises(InvalidInputError, match="3 queries a task, and 5 were asked for"):
        mini.build(tmp_path, queries=5)
    name = next(n for n in again["files"] if n.endswith(".png"))
    (tmp_path / name).write_bytes(b"changed")
    with pytest.raises(DataLossError, match="is not what manifest.json says"):
        mini.build(tmp_path, queries=3)


def test_too_many_queries() -> None:
    with pytest.raises(InvalidInputError, match="concepts for at most"):
        mini._concepts(100_000)
