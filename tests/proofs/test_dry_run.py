"""All 78 data sets of MMEB-V2, in small and in the published layouts, through the command, the
cascade and the built-in models.

What the figures are means nothing: the pictures are of one colour. `tests/evaluation` has the same
with stages that know the colours, in seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import compile_cache
from tests.evaluation import layouts
from tests.proofs.running import BUILTIN
from tte_jax.evaluation.mmeb_v2.registry import DATASETS

ARMS = ("none", "full16", "full16-ecrr2")
LIMIT_S = 20 * 60


@pytest.mark.skipif(not BUILTIN, reason="make proofs runs it with the built-in models")
def test_all_78_run_through_the_command_with_real_models(tmp_path: Path) -> None:
    root, out = layouts.write_all(tmp_path / "data"), tmp_path / "out"
    command = [
        sys.executable, "-m", "tte_jax.cli.app", "eval", "mmeb-v2", "--data", str(root),
        "--out", str(out), "--ecr", "none,full", "--budgets", "16", "--rerank", "off,ecrr",
        "--depths", "2", "--json",
    ]  # fmt: skip
    # What the services compiled, and other tests, serves here too.
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "compile-cache").symlink_to(compile_cache.directory())
    began = time.monotonic()
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TTE_DATA_DIR": str(state)}
    )
    seconds = time.monotonic() - began
    assert found.returncode == 0, found.stderr[-2000:]
    said = json.loads(found.stdout)
    assert said["failed"] == {} and said["left_out"] == []
    runs = {run["name"].partition("/")[2]: run for run in said["runs"]}
    assert set(ARMS) < set(runs)
    for run in runs.values():
        assert run["tasks"].keys() == {info.name for info in DATASETS}
        assert run["means"]["All"]["value"] is not None
    for path in out.rglob("*_info.json"):
        about = json.loads(path.read_text())
        assert about["queries_failed"] == 0 and not about["candidates_failed"], path
    print(f"78 data sets, {len(runs)} arms: {seconds:.0f} s")
    assert seconds < LIMIT_S
