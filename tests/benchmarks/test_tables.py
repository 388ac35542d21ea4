"""The documentation's tables say what the committed results and the code say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import code_tables, model_tables, tables
from benchmarks.markdown import table
from tte_jax import limits
from tte_jax.builtin.models import NAMES


def spread(p50: float, p95: float) -> dict[str, float]:
    return {"p50_ms": p50, "p95_ms": p95, "mean_ms": p50}


ABOUT: dict[str, Any] = {
    "command": "python -m benchmarks.search", "date": "2026-01-02", "commit": "abc",
    "machine": {"cores": 2, "cpu": "Some CPU"}, "versions": {"jax": "0.1"}, "noisy": False,
}  # fmt: skip
KIND = {
    "queries": 3, "first_ranking": spread(10.4, 20.6), "final": spread(30, 40),
    "stages": {
        "reason": {"wall": spread(5, 6), "tokens_out": 12.4},
        "embed": {"wall": spread(0, 0), "tokens_out": 0.0, "within": {"reason": 3}},
        "rerank": {"wall": spread(7, 8), "tokens_out": 0.0},
    },
}  # fmt: skip
LOAD = {"queries_per_s": 6.25, "all": KIND, "kinds": {"text": KIND}}
SEARCH = ABOUT | {"clients": {"1": LOAD, "4": LOAD}, "compile_counts": {"during": {"embedder": 0}}}
HITS = {"hit@1": 0.5, "hit@1_ci95": [0.4, 0.6], "hit@10": 0.9, "hit@10_ci95": [0.8, 1.0]}
QUALITY = {
    "command": "python -m training.builtin.evaluate", "budget": 64, "rerank_depth": 10,
    "models": {"reasoner": "m@1", "embedder": "m@1", "reranker": None},
    "tasks": {
        "text": {
            "chance": {"hit@1": 0.01, "hit@10": 0.1},
            "none": {**HITS, "hit@1": 0.25, "by": {"unseen concept": {**HITS, "queries": 7}}},
            "ecr": {**HITS, "by": {}},
            "about": {"queries": 20, "pool": 1594},
        }
    },
}  # fmt: skip


def test_committed_pages_hold_what_the_committed_results_say() -> None:
    assert [str(path) for path in tables.stale()] == [], "run `python -m benchmarks.tables`"


def test_every_table_stands_on_some_page() -> None:
    pages = "".join((tables.ROOT / page).read_text() for page in tables.PAGES)
    for name in (*tables.MEASURED, *tables.FROM_CODE):
        assert f"<!-- table:{name} -->" in pages


def test_a_missing_result_leaves_the_command_that_makes_it(tmp_path: Path) -> None:
    page = "a\n<!-- table:startup -->\nold\n<!-- /table -->\nb\n"
    text = tables.filled(page, tmp_path)
    assert "python -m benchmarks.startup" in text and "old" not in text
    assert text.startswith("a\n<!--") and text.endswith("<!-- /table -->\nb\n")
    assert tables.filled(text, tmp_path) == text


def test_latency_shows_quantiles_stages_and_where_they_were_measured(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    text = tables.render("latency", tmp_path)
    assert "| text | 10 / 21 | 30 / 40 | 5 | in reason | 7 | 12 |" in text
    assert "abc" in text and "Some CPU" in text and "meanwhile" not in text
    (tmp_path / "search.json").write_text(json.dumps(SEARCH | {"noisy": True}))
    assert "Other work ran on the machine meanwhile" in tables.render("latency", tmp_path)


def test_load_has_a_row_for_each_number_of_clients(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    text = tables.render("load", tmp_path)
    assert "| 1 | 6.2 |" in text and "| 4 | 6.2 |" in text
    assert "compiled while serving these: 0" in text


def test_loading_has_a_row_for_each_dtype(tmp_path: Path) -> None:
    figures = {"weights_bytes": 2 * 10**9, "peak_bytes": 22 * 10**8, "ratio": 1.1, "seconds": 3.04}
    result = ABOUT | {"file_dtype": "bfloat16", "loads": {"float32": figures}}
    (tmp_path / "load.json").write_text(json.dumps(result))
    text = tables.render("loading", tmp_path)
    assert "| bfloat16 → float32 | 2.00 | 2.20 | 1.10 | 3.0 |" in text


def test_quantisation_shows_both_precisions(tmp_path: Path) -> None:
    model = {
        "cosine": {
            "labels": {"mean": 0.99991, "least": 0.9995},
            "pictures": {"mean": 1, "least": 1},
        },
        "bytes": {"float32": 48 * 10**6, "int8": 16 * 10**6},
        "speed_ratio": {"batch": 0.803},
    }
    (tmp_path / "quantisation.json").write_text(json.dumps(ABOUT | {"models": {"m": model}}))
    text = tables.render("quantisation", tmp_path)
    cosines = "0.99991 / 0.99950; 1.00000 / 1.00000"
    assert f"| m | {cosines} | 48 → 16 | 0.80 |" in text and "batch, times as fast" in text


def test_parity_marks_what_misses_its_limit(tmp_path: Path) -> None:
    cells = {"text": 5.04e-6, "video": None, "untied": 2e-4}
    about = {"limit": 1e-4, "reference": {"torch": "2"}, "versions": {"transformers": "5"}}
    result = ABOUT | about | {"largest_deviation_of_logits": {"qwen3": cells}}
    (tmp_path / "parity.json").write_text(json.dumps(result))
    text = tables.render("parity", tmp_path)
    assert "| `qwen3` | 5.0e-06 | – | **2.0e-04** |" in text and "limit 0.0001" in text


def test_quality_shows_what_reasoning_is_worth_and_missing_arms_as_missing(tmp_path: Path) -> None:
    (tmp_path / "builtin_quality.json").write_text(json.dumps(QUALITY))
    text = tables.render("quality-summary", tmp_path)
    cells = "| text | 1,594 | 0.010 / 0.100 | 0.250 / 0.900 | 0.500 / 0.900 | – | +25.0 |"
    assert cells in text
    text = tables.render("quality", tmp_path)
    assert "| · unseen concept | 0.500 (0.400 to 0.600) |" in text and "| 7 |" in text
    assert "`m@1`" in text and "None" not in text


def test_mini_mmeb_marks_what_is_above_chance(tmp_path: Path) -> None:
    def arm(score: float, low: float) -> dict[str, float]:
        return {"score": score, "low": low, "high": score + 0.1}

    arms = {"none": arm(0.5, 0.4), "full64": arm(0.3, 0.2), "full64-ecrr10": arm(0.25, 0.25)}
    task = {"modality": "image", "group": "qa", "like": "GQA", "pool": 1234, "chance": 0.25,
            "queries": 40, "arms": arms}  # fmt: skip
    pages = task | {"modality": "visdoc", "group": "vidore_v1"}
    found = {"models": {"a": {"version": "m@1"}, "b": {"version": "m@1"}},
             "tasks": {"mini-qa": task, "mini-manual": pages}}  # fmt: skip
    (tmp_path / "mini_mmeb.json").write_text(json.dumps(ABOUT | found))
    text = tables.render("mini-mmeb", tmp_path)
    cells = "| image, qa | GQA | 1,234 | 25.0 | **50.0** (40 to 60) | 30.0 (20 to 40) | 25.0 (25"
    assert cells in text and "| visdoc, pages |" in text
    assert text.count("`m@1`") == 1 and "40 queries a task" in text


def test_a_result_of_another_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "startup.json").write_text("{}")
    with pytest.raises(ValueError, match="startup.json lacks 'first'"):
        tables.filled("<!-- table:startup -->\n<!-- /table -->\n", tmp_path)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table:nothing -->\n<!-- /table -->\n", "no table is called 'nothing'"),
        ("<!-- table:startup -->\n", "1 `<!-- table:NAME -->` but 0"),
        ("<!-- table:load -->\n<!-- table:startup -->\n<!-- /table -->\n", "2 .* but 1"),
    ],
)
def test_wrong_markers_are_errors(page: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tables.filled(page, tmp_path)


def test_a_limit_without_a_description_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_NEW_THINGS", 3, raising=False)
    with pytest.raises(ValueError, match="MAX_NEW_THINGS"):
        code_tables.limits_()


def test_cells_are_escaped_and_counted() -> None:
    assert "a \\| b" in table(["x"], [["a | b"]])
    with pytest.raises(ValueError, match="expected 1 cells, got 2"):
        table(["x"], [["a", "b"]])


def test_models_are_counted_from_their_files(tmp_path: Path) -> None:
    assert "python -m training.builtin.export" in model_tables.models(tmp_path)
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"a": np.zeros((1000, 300), np.float32), "b": np.zeros(100_000, np.float32)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        text = {"num_hidden_layers": 4, "hidden_size": 256, "vocab_size": 4096}
        config: dict[str, Any] = {"model_type": "qwen3", **text}
        if name == NAMES[0]:
            vision = {"depth": 6, "embed_dim": 192}
            config = {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tte.json").write_text(json.dumps({"role": ["reasoner", "embedder"]}))
    text = model_tables.models(tmp_path)
    assert "6 vision layers, 192 wide; 4 text layers, 256 wide | 4,096 | 0.4 M | 1.6 MB |" in text
    assert "| `qwen3` | reasoner and embedder | 4 text layers, 256 wide |" in text
