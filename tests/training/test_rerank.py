"""What the reranker's trainer computes is what the role serves, and rows become lists fairly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from training import builtin
from training.builtin.rerank_rows import spoil
from training.rerank import PRESETS, Config, RowSource, main, read_rows, score
from tte_jax.builtin.models import RERANKER, path_of
from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.reranker import Reranker
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs

ROWS = [
    {
        "query": "animal mammal: face, pet. Answer: cow",
        "candidates": ["animal: pet. Answer: dog", "animal: face. Answer: cow", "Answer: fox"],
        "labels": [0, 1, 0],
    },
    {"query": "a red heart", "candidates": ["Answer: blue heart"], "labels": [0]},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n")
    return path


def test_trained_margins_are_served_scores(rows: Path) -> None:
    prompts = PromptSet.from_dir(path_of(RERANKER))
    source = RowSource(rows, prompts, Config(lists=6, candidates=3))
    batch = next(source.batches(0))
    with Reranker.from_pretrained(path_of(RERANKER)) as served:
        margins = score(served.served.model, batch, prompts.yes_id, prompts.no_id)
        for row in ROWS:
            expected = served.score(row["query"], row["candidates"])
            ids = prompts.rerank_prefix(row["query"]).ids
            for i in range(6):
                if batch.prefix[i, : len(ids)].tolist() != list(ids):
                    continue
                for j, label in enumerate(batch.labels[i]):
                    if label < 0:
                        continue
                    mine = float(jax.nn.sigmoid(margins[i, j]))
                    assert np.abs(expected - mine).min() < 1e-4


def test_places_without_a_candidate_are_marked(rows: Path) -> None:
    prompts = PromptSet.from_dir(path_of(RERANKER))
    batch = next(RowSource(rows, prompts, Config(lists=12, candidates=3)).batches(1))
    full = (batch.labels >= 0).all(1)
    assert full.any() and not full.all()
    assert set(batch.labels[full][:, 0]) == {1}  # the right one is always among the chosen
    assert batch.labels[~full].tolist()[0] == [0, -1, -1]


def test_the_reranker_has_the_shape_of_its_directory() -> None:
    prompts = PromptSet.from_dir(path_of(RERANKER))
    config = builtin.reranker_config(prompts.tokenizer)
    built = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0)))
    shipped = hf.load(path_of(RERANKER))
    assert jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(built))) == jax.tree.map(
        lambda x: x.shape, nnx.to_pure_dict(nnx.state(shipped))
    )


def test_spoilt_pictures_stay_pictures_of_the_same_size() -> None:
    picture = np.full((112, 112, 3), 255, np.uint8)
    picture[40:70, 40:70] = 0
    rng = np.random.default_rng(0)
    spoilt = [spoil(picture, rng, 1.0) for _ in range(8)]
    assert {s.shape for s in spoilt} == {(112, 112, 3)} and spoilt[0].dtype == np.uint8
    assert all(s[45:65, 45:65].mean() < 160 < s[:10, :10].mean() for s in spoilt)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"query": "a", "candidates": ["b"]}',
        '{"query": "a", "candidates": ["b"], "labels": [1, 0]}',
        '{"query": "a", "candidates": ["b"], "labels": [2]}',
        '{"query": "a", "candidates": [], "labels": []}',
        '["query", "candidates", "labels"]',
    ],
)
def test_a_row_that_is_none_is_named(rows: Path, line: str) -> None:
    rows.write_text(rows.read_text() + line + "\n")
    with pytest.raises(InvalidInputError, match=r"rows.jsonl:3: expected"):
        read_rows(rows)


def test_a_text_may_hold_any_separator_of_lines(rows: Path) -> None:
    row = {"query": "a\u2028b\x85c", "candidates": ["d\x0ce"], "labels": [1]}
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_rows(rows) == [row]


def test_fewer_steps_than_the_rate_rises_in_is_an_error(rows: Path, tmp_path: Path) -> None:
    few = replace(
        PRESETS["builtin"], rows=rows, start=path_of(RERANKER), out=tmp_path / "few", steps=10
    )
    with pytest.raises(InvalidInputError, match="10 steps leave nothing after a warm-up of 40"):
        main(few)


def test_rows_that_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="rerank_rows"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "wrong.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    with pytest.raises(InvalidInputError, match="no row with a right candidate"):
        read_rows(tmp_path / "wrong.jsonl")


def test_a_run_that_is_stopped_goes_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(
        PRESETS["builtin"], rows=rows, start=path_of(RERANKER), lists=2, candidates=2, steps=4,
        warmup=1, lr=1e-4, report_every=1,
    )  # fmt: skip
    main(replace(settings, out=tmp_path / "whole"))
    from training import rerank

    asked = iter([False, True, *[False] * 8])
    monkeypatch.setattr(rerank.StopRequest, "asked", lambda self: next(asked))
    parts = replace(settings, out=tmp_path / "parts")
    with pytest.raises(SystemExit):  # whoever started it must not take this for the end
        main(parts)
    assert not (parts.out / "export").exists(), "it was stopped after two steps"
    for changed in ({"seed": 1}, {"lists": 3}, {"optimiser": "adamw"}):
        with pytest.raises(PreconditionError, match=next(iter(changed))):
            main(replace(parts, **changed))
    there = rows.read_text()
    rows.write_text(there + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(PreconditionError, match="rows .* another --out"):
        main(parts)
    rows.write_text(there)
    main(parts)

    def told(out: Path) -> list[dict[str, float]]:
        found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: r[k] for k in ("step", "loss", "first")} for r in found]

    assert told(parts.out) == told(tmp_path / "whole") and len(told(parts.out)) == 4
    ours, theirs = (
        nnx.to_pure_dict(nnx.state(hf.load(out / "export")))
        for out in (parts.out, tmp_path / "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
