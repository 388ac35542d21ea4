"""Tables of the trainers' proofs: what is measured is shown, and a missed goal says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import builtin_training, rounds, training_tables
from benchmarks.experiments import figures
from training.builtin import train
from training.builtin.stages import Journal

ABOUT: dict[str, Any] = {
    "command": "python -m benchmarks.x", "date": "2026-01-02", "commit": "abc", "noisy": False,
    "machine": {"cores": 2, "cpu": "Some CPU"}, "versions": {"jax": "0.1"},
}  # fmt: skip


def mean(value: float) -> dict[str, Any]:
    return {"mean": value, "spread": 0.0125, "seeds": [value], "tasks": {"text": value}}


def arm(value: float, negatives: float, false: float) -> dict[str, Any]:
    figures = {"negatives": negatives, "false": false, "near": false / 2}
    return {"hit@1": mean(value), "mrr": mean(value + 0.1), **figures}


def difference(value: float, verdict: str) -> dict[str, Any]:
    return {
        "difference": value, "low": value - 0.01, "high": value + 0.01, "seeds": [value, -value],
        "verdict": verdict,
    }  # fmt: skip


def test_arms_show_spread_false_negatives_and_the_verdict() -> None:
    result = ABOUT | {
        "queries": 1600, "documents": 1500, "asked": {"text": 400},
        "recipe": {"seeds": [0, 1, 2], "steps": 60, "batch": 32, "negatives": 4},
        "start": {"hit@1": mean(0.4), "mrr": mean(0.5)},
        "arms": {"none": arm(0.45, 0, 0), "embedder": arm(0.43, 4, 0.625)},
        "differences": {
            "embedder over none": {
                "hit@1": difference(-0.02, "worse"), "mrr": difference(-0.005, "no difference"),
            }
        },
    }  # fmt: skip
    text = training_tables.arms(result)
    assert "| none | 0.450 ± 0.013 | 0.550 ± 0.013 | 0.0 | – | – |" in text
    assert "0.430 ± 0.013 | 0.530 ± 0.013 | 4.0 | 62.5 % | 31.2 % |" in text
    assert "nearest by the embedder over none | -2.0 (-3.0 to -1.0) | -2.0, +2.0 | worse |" in text
    assert "-0.5 (-1.5 to +0.5) | no difference |" in text and "1,600 training queries" in text


def test_rounds_show_every_retriever_and_what_became_of_it(tmp_path: Path) -> None:
    def ranked(none: list[int], ecr: list[int]) -> dict[str, Any]:
        return {"tasks": {"text": {"ranks": {"none": none, "ecr": ecr}}}}

    begin, after = ranked([0, 1, 0, 50], [0, 0, 9, 1]), ranked([0, 0, 0, 1], [1, 1, 9, 1])
    result = ABOUT | {
        "queries": {"text": 450, "image": 350}, "steps": 60, "asked": {"text": 4},
        "states": {"begin": rounds.state(begin), "round 1": rounds.state(after)},
        "rounds": [{
            "round": 0, "kept": False, "models": {"embedder": "e@1", "reranker": "r@2"},
            "difference": {"none": [0.31, 0.1, 0.5], "ecr": [-0.25, -0.4, -0.1]},
            "mined": {"records": 800, "negatives": 5600, "false_negatives": 400},
        }],
    }  # fmt: skip
    made = training_tables.rounds(result)
    assert "| begin | 50.0 (" in made and "| round 1 | 75.0 (" in made
    row = "| round 1 | +31.0 (+10.0 to +50.0) | -25.0 (-40.0 to -10.0) | dropped | 7.0 | 0.5 |"
    assert row in made and "`e@1`, `r@2`" in made
    (tmp_path / "rounds.json").write_text(json.dumps(result))
    shown = figures.shown(tmp_path)
    assert [path.name for path in figures.write(shown, tmp_path)] == ["rounds.svg"]
    assert figures.stale(shown, tmp_path) == []


def test_false_negatives_are_held_against_the_goal() -> None:
    def found(kept: float) -> dict[str, Any]:
        return {"kept_out": kept, "duplicates": 3, "same_group": 7, "negatives": 70,
                "dropped": 0.25, "without": 0.125}  # fmt: skip

    result = ABOUT | {
        "duplicates": 9, "documents": 99, "pairs": 20, "candidates": 19, "negatives": 7,
        "copies": "redrawn", "rules": {"percent_of_positive": 1.0},
        "arms": {"embedder": found(0.1), "reranker": found(0.9), "reranker, t = 0.9": found(0.96)},
    }  # fmt: skip
    text = training_tables.false_negatives(result)
    assert "| nearest by the embedder | 10.0 % | 3 | 10.0 % | 25.0 % | 12.5 % |" in text
    assert "| reranker, t = 1 | 90.0 % (below the goal) |" in text
    assert "| reranker, t = 0.9 | 96.0 % ✓ |" in text and "trained with" not in text
    both = {"hit@1": mean(0.5), "mrr": mean(0.6)}
    quality = {
        "start": both, "arms": {"reranker": both},
        "difference": {m: difference(0.02, "better") for m in ("hit@1", "mrr")},
    }  # fmt: skip
    text = training_tables.false_negatives(result | {"quality": quality})
    assert "+2.0 (+1.0 to +3.0): better" in text


def test_gradients_and_the_largest_of_the_temporaries() -> None:
    gradient = {"sub_batches": 5, "gradients_apart": 2e-6, "largest_gradient": 0.5,
                "loss_apart": 0.0, "dropout_moves_the_loss_by": 0.125}  # fmt: skip
    sizes = {"forward": 2**20, "loss": 3 * 2**20, "backward": 2 * 2**20, "vectors": 2**19}
    result = ABOUT | {
        "model": "m", "sub_batch_tokens": 512, "gradients": {"full": gradient},
        "memory": {"64": sizes | {"direct": 2**23}, "4096": sizes},
    }  # fmt: skip
    text = training_tables.gradcache(result)
    assert "| full | 5 | 2.0e-06 (misses the goal) |" in text
    assert "| 64 | 1.0 | 3.0 | 2.0 | **3.0** | 0.5 | 8 |" in text
    assert "| 4096 | 1.0 | 3.0 | 2.0 | **3.0** | 0.5 | – |" in text


@pytest.mark.parametrize(("ratio", "mark"), [(1.31, "1.31 ✓"), (1.29, "1.29 (misses the goal)")])
def test_speed_is_held_against_the_goal(ratio: float, mark: str) -> None:
    names = ("packed", "padded", "torch")
    result = ABOUT | {
        "ratio": {"packed": ratio, "padded": 1.0}, "pad_share": dict.fromkeys(names, 0.1),
        "seconds_per_step": dict.fromkeys(names, 2.0), "parameters": 5e6, "pairs": 32,
        "examples_per_second": dict.fromkeys(names, 16.0), "tokens": 3000, "torch": "2.9",
    }  # fmt: skip
    text = training_tables.training(result)
    assert f"| ours, packed | 2.000 | 16.0 | 10 % | {mark} |" in text
    assert "| PyTorch | 2.000 | 16.0 | 10 % | 1 |" in text


def test_kills_that_changed_something_are_named() -> None:
    result = ABOUT | {
        "kills": 3, "by_both": {"loop while mining": 2, "trainer while training": 1},
        "runs_compared": 2, "rounds": 2, "examples": 48, "different": [], "lost_or_twice": [],
        "equal": True,
    }  # fmt: skip
    text = training_tables.loop_kills(result)
    assert "| loop while mining | 2 |" in text and "| all | 3 |" in text
    assert "same to the last bit" in text
    text = training_tables.loop_kills(result | {"equal": False, "different": ["retriever 1"]})
    assert "**Different: retriever 1.**" in text and "last bit" not in text


def test_a_run_from_nothing_tells_its_stages_and_how_good_the_models_are(tmp_path: Path) -> None:
    def held_out(hit: float, model: str) -> dict[str, Any]:
        arms = {arm: {"hit@1": hit, "hit@10": 0.9, "by": {}} for arm in builtin_training.ARMS}
        task = {"chance": {"hit@1": 0.1}, **arms, "about": {"queries": 3}}
        return {"models": {"reasoner": model, "embedder": model}, "tasks": {"text": task}}

    recipe = train.Config(data=tmp_path / "data", out=tmp_path)
    stages = train.recipe(recipe)
    journal = Journal(tmp_path)
    journal.add(stages[0], seconds=60.0, code=143)
    for stage in stages:
        journal.add(stage, seconds=600.0, code=0)
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds/rounds.jsonl").write_text('{"kept": true}\n{"kept": false}\n')
    (tmp_path / "quality.json").write_text(json.dumps(held_out(0.25, "mini@new")))
    found = builtin_training.gathered(stages, tmp_path)
    assert found["seconds"] == 600 * len(stages) + 60
    assert [one["command"] for one in found["stages"]] == [stage.command for stage in stages]
    shipped = builtin_training.quality(held_out(0.5, "mini@shipped"))
    text = training_tables.builtin_training(ABOUT | found | {"shipped": shipped})
    assert "| tokenizer | 11.0 | 9 % |" in text and "| **all** | **121** ✓ |" in text
    assert "| text | 0.250 | 0.250 | 0.250 | 0.500 | 0.500 | 0.500 |" in text
    assert (
        "Of 2 rounds of mined negatives 1 were kept. Interruptions after which it went on: 1."
        in text
    )
    assert "Shipped: `mini@shipped`." in text
    slow = ABOUT | found | {"seconds": 3 * 3600 + 1}
    assert "| **all** | **180** (misses the goal) |" in training_tables.builtin_training(slow)
