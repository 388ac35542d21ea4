"""The recipe: which commands, in which order, with options that their modules know."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from training.builtin.stages import Stage
from training.builtin.train import Config, Sizes, check, main, recipe
from tte_jax.builtin.models import REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.cli import exits
from tte_jax.errors import InvalidInputError, NotFoundError

NOTHING = Config(data=Path("data"), out=Path("out"), version="7")
FROM = replace(NOTHING, start=WEIGHTS_DIR)


def parsed(stage: Stage) -> dict:
    """The stage's options as its module reads them; SystemExit for one that it does not know."""
    module = importlib.import_module(stage.module)
    return vars(tyro.cli(module.Config, args=list(stage.options)))


def by_name(config: Config) -> dict[str, dict]:
    return {stage.name: parsed(stage) for stage in recipe(config)}


def test_from_nothing_every_stage_reads_what_an_earlier_one_makes() -> None:
    stages = by_name(NOTHING)
    assert list(stages)[:3] == ["tokenizer", "tower", "unified"]
    made = Path("out/tokenizer")
    for name, options in stages.items():
        if "tokenizer" in options and name != "reranker":
            assert options["tokenizer"] == made, name
    assert stages["tower"]["phases"] == ((56, 1500, 256),)
    assert stages["unified"]["vision"] == stages["tower"]["out"] / "visual.npz"
    assert stages["own"]["model"] == stages["export-unified"]["out"] / REASONER
    assert stages["unified-own"]["own"] == stages["own"]["out"]
    assert stages["rerank-rows"]["model"] == stages["export-own"]["out"] / REASONER
    assert stages["reranker"]["rows"] == stages["rerank-rows"]["out"]
    # No reranker yet, so it begins with the decoder of the unified model.
    assert stages["reranker"]["start"] == stages["rerank-rows"]["model"]
    assert stages["export"]["reranker"] == stages["reranker"]["out"] / "export"
    assert stages["rounds"]["models"] == stages["export"]["out"] == stages["export-own"]["out"]
    assert stages["rounds"]["own"] == stages["own"]["out"]
    # Rounds are judged by other queries than the final figures are of.
    assert stages["rounds"]["skip"] >= stages["evaluate"]["limit"]
    assert stages["rounds"]["seed"] + 1 != stages["evaluate"]["seed"]
    assert stages["evaluate"]["models"] == stages["rounds"]["result"]
    assert all(s["version"] == "7" for n, s in stages.items() if n.startswith("export"))


def test_from_a_start_there_is_no_tokenizer_and_no_tower() -> None:
    stages = by_name(FROM)
    assert not {"tokenizer", "tower"} & set(stages)
    assert stages["unified"]["start"] == WEIGHTS_DIR / REASONER
    assert stages["reranker"]["start"] == WEIGHTS_DIR / RERANKER
    assert stages["export"]["tokenizer"] == WEIGHTS_DIR / REASONER
    assert stages["unified"]["steps"] == 720


@pytest.mark.parametrize("config", [NOTHING, FROM])
def test_one_schedule_whose_tail_reads_the_models_own_reasonings(config: Config) -> None:
    stages = by_name(config)
    first, tail = stages["unified"], stages["unified-own"]
    assert first["own"] is None and tail["own"] is not None
    assert first["until"] == round(0.8 * first["steps"]) and tail["until"] == 0
    same = {k for k in first if k not in ("own", "until")}
    assert {k: first[k] for k in same} == {k: tail[k] for k in same}


def test_without_rounds_the_first_models_are_the_last() -> None:
    stages = by_name(replace(NOTHING, sizes=Sizes(rounds=0)))
    assert "rounds" not in stages
    assert stages["evaluate"]["models"] == stages["export"]["out"] == Path("out/models")


def test_names_and_products_are_told_apart() -> None:
    for config in (NOTHING, FROM):
        names = [stage.name for stage in recipe(config)]
        assert len(set(names)) == len(names)
        assert all(stage.makes.is_relative_to(config.out) for stage in recipe(config))


def test_what_would_fail_after_hours_fails_at_once(tmp_path: Path) -> None:
    config = Config(data=tmp_path / "data", out=tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"python -m training.data.emoji --out .*data"):
        check(config)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").touch()
    check(config)
    check(replace(config, start=WEIGHTS_DIR))
    with pytest.raises(NotFoundError, match=f"no model directory {REASONER}"):
        check(replace(config, start=tmp_path))
    with pytest.raises(InvalidInputError, match="--out .* is a file"):
        check(replace(config, out=tmp_path / "data/manifest.json"))
    with pytest.raises(InvalidInputError, match="--version is empty"):
        check(replace(config, version=" "))
    with pytest.raises(InvalidInputError, match="--sizes.own-share 1.0"):
        check(replace(config, sizes=Sizes(own_share=1.0)))
    with pytest.raises(InvalidInputError, match="tower-steps 0 is not more than the 100 steps"):
        check(replace(config, sizes=Sizes(tower_steps=0)))
    with pytest.raises(InvalidInputError, match="unified-steps 5 is not more than the 40 steps"):
        check(replace(config, sizes=Sizes(unified_steps=5)))
    check(replace(config, start=WEIGHTS_DIR, sizes=Sizes(unified_steps=25)))


def test_errors_are_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Config(data=tmp_path / "none", out=tmp_path / "out")) == exits.NOT_FOUND
    assert capsys.readouterr().err.startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").touch()
    config = Config(data=tmp_path, out=tmp_path / "out", dry_run=True)
    assert main(config) == exits.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines == [stage.command for stage in recipe(config)]
    assert not (tmp_path / "out").exists()
