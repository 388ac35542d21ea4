"""`benchmarks.gpu` runs: every part at a tiny shape on the CPU, and its traces add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_trace
from benchmarks.environment import ROOT


@pytest.mark.timeout(900)  # it compiles three roles
def test_every_part_runs_at_a_tiny_shape(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    parts = result["parts"]
    assert list(parts) == ["rates", "decode", "prefill", "embed", "rerank", "generate"]
    assert result["torch"], "the comparison was left out"
    said = [row["what"] for part in parts.values() for row in part["rows"]]
    for what in ("decode, batch 1", "MFU", "embed 9 mixed", "rerank 6", "cache driven by hand",
                 "generate, 16", "first token"):  # fmt: skip
        assert any(what in line for line in said), what
    assert all(row["figure"] > 0 for part in parts.values() for row in part["rows"])
    for part in ("decode", "prefill"):
        trace = parts[part]["trace"]
        assert trace["busy_s"] > 0 and trace["top"], "the trace has no kernels in it"
        assert sum(trace["kinds"].values()) == pytest.approx(1.0, abs=0.01)
    assert "idle between kernels" in done.stdout


def test_times_add_up_by_kind_and_overlaps_count_once() -> None:
    stream = [("gemm_a", 0.0, 4.0), ("loop_fusion", 3.0, 2.0), ("gemm_a", 6.0, 2.0)]
    other = [("MemcpyD2D", 0.0, 2.0)]
    found = gpu_trace.add_up([stream, other], wall_s=10.0)
    assert found["busy_s"] == 7.0 and found["idle_share"] == 0.3
    assert found["kinds"] == {"products": 0.6, "other fusions": 0.2, "copies": 0.2}
    assert found["top"][0] == ["gemm_a", 0.6, 2]
    assert "| products | 60 % |" in gpu_trace.text(found)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nvjet_tst_64x64_NTT", "products"),
        ("dynamic-update-slice.3", "copies"),
        ("input_reduce_fusion_1", "reductions, softmax, norms"),
        ("loop_add_fusion", "other fusions"),
        ("something", "else"),
    ],
)
def test_names_of_kernels_say_what_they_do(name: str, what: str) -> None:
    assert gpu_trace.kind(name) == what
