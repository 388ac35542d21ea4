"""The engine's benchmark keeps its parts, and its table says what stands where."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import tables
from benchmarks.engine.__main__ import Config, main
from benchmarks.engine.rounds import row

ABOUT = {"date": "2026-01-02", "commit": "abc", "noisy": False, "minutes": 1.0,
         "machine": {"cores": 2, "cpu": "Some CPU"}, "versions": {"jax": "0.1"}}  # fmt: skip


def part(figure: float, **about: object) -> dict[str, object]:
    return {"rows": [row("a hop", figure, 1.5, " ms", most=True)], "about": ABOUT | about}


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path: Path, capsys) -> None:
    out = tmp_path / "engine.json"
    out.write_text(json.dumps({"sizes": {"builtin": {"parameters": {}, "start": part(1.0)}}}))
    before = out.read_text()
    config = Config(parts=("start",), sizes=("builtin",), data_dir=tmp_path / "data", out=out)
    assert main(config) == 0
    assert out.read_text() == before
    assert "start: measured on 2026-01-02" in capsys.readouterr().out


def test_the_table_says_which_parts_were_measured_on_a_busy_machine(tmp_path: Path) -> None:
    sizes = {
        "random": {"parameters": {}, "serve": part(1.0)},
        "builtin": {"serve": part(2.0, noisy=True, date="2026-01-03", commit="def")},
    }
    (tmp_path / "engine.json").write_text(json.dumps({"sizes": sizes}))
    text = tables.render("engine", tmp_path)
    assert "| a hop | ≤ 1.5 ms | 1 ok | 2 miss |" in text
    assert "until 2026-01-03, commits abc, def" in text
    assert "beside: builtin serve.**" in text
