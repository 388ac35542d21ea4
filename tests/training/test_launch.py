"""Which process of which job this is: Slurm's and JobSet's environments, and options."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from training import configuration, contrastive, launch, sft
from training.launch import FIRST_PORT, Job, find, first_host
from tte_jax.errors import InvalidInputError
from tte_jax.sharding import parse_mesh

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-005,9],login", "gpu003"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]-gpu,x", "rack1-gpu"),
        ("node-a.cluster,node-b.cluster", "node-a.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "gpu[1-2", ",a"])
def test_a_node_list_that_is_not_understood(nodes: str) -> None:
    with pytest.raises(InvalidInputError, match="--job.coordinator"):
        first_host(nodes)


def test_slurm() -> None:
    env = {"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_JOB_ID": "4097"}
    found = find(Job(), env | {"SLURM_STEP_NODELIST": "n[2-3]"})
    assert found == Job(f"n2:{FIRST_PORT + 1}", 16, 3)
    assert find(Job(), {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_jobset_and_options_before_it() -> None:
    env = {"TTE_COORDINATOR": "a-0-0.a:8476", "TTE_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}
    assert find(Job(), env) == Job("a-0-0.a:8476", 4, 2)
    assert find(Job("h:1", 2, 0), env) == Job("h:1", 2, 0)
    assert find(Job(), {}) is None


@pytest.mark.parametrize(
    ("given", "env"),
    [
        (Job("host:1", 2, 2), {}),
        (Job("host", 2, 0), {}),
        (Job(), {"TTE_COORDINATOR": "h:1"}),
        (Job(), {"TTE_COORDINATOR": "h:1", "TTE_PROCESSES": "two"}),
    ],
)
def test_half_a_job_is_an_error(given: Job, env: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError):
        find(given, env)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("jobset/*.yaml")), ids=lambda f: f.name)
def test_a_jobset_says_the_same_everywhere(file: Path) -> None:
    made: dict[str, Any] = yaml.safe_load(file.read_text())
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    name = f"{made['metadata']['name']}-{job['name']}-0-0.{made['metadata']['name']}"
    found = find(Job(), env | {"JOB_COMPLETION_INDEX": "1"})
    assert found == Job(f"{name}:8476", spec["parallelism"], 1)
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    config = configuration.parse(contrastive.PRESETS, "", container["args"])
    (devices,) = container["resources"]["limits"].values()
    sizes = parse_mesh(config.mesh)
    assert sizes["data"] * sizes["fsdp"] * sizes["tp"] == found.processes * int(devices)
    assert config.global_batch == 8192 and config.steps == 625


SLURM = {
    # The step runs in a session of its own, as tasks on other nodes do: only scancel reaches it.
    "srun": 'shift; setsid "$@" & echo $! > "$SPOOL/task"; wait $!',
    "scancel": 'echo "scancel $*" >> "$SPOOL/told"; kill -TERM "$(cat "$SPOOL/task")"',
    "scontrol": 'echo "scontrol $*" >> "$SPOOL/told"',
    "trainer": """
        trap 'sleep 0.3; echo saved >> "$SPOOL/told"; exit 0' TERM
        touch "$SPOOL/ready"
        [ "$*" = "-m training.$MODULE --steps 3" ] || exit 64
        [ "$ENDS" = waits ] || exit "$ENDS"
        while true; do sleep 0.05; done""",
}


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("slurm/*.sbatch")), ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        ("0", 0, []),
        ("7", 7, []),
        ("waits", 0, ["scancel --signal=TERM 41.0", "saved", "scontrol requeue 41"]),
    ],
)
def test_a_batch_file_saves_and_is_queued_again(
    file: Path, ends: str, code: int, told: list[str], tmp_path: Path
) -> None:
    for name, script in SLURM.items():
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{script}\n")
        command.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SPOOL": str(tmp_path),
        "TTE_PYTHON": "trainer", "MODULE": file.stem, "ENDS": ends,
    }  # fmt: skip
    job = subprocess.Popen(["bash", file, "--steps", "3"], env=env)
    if ends == "waits":
        until = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        job.terminate()
    assert job.wait(30) == code
    lines = tmp_path / "told"
    assert (lines.read_text().splitlines() if lines.exists() else []) == told
    # Slurm signals the batch shell, and nothing else, only when it is asked to.
    assert "#SBATCH --signal=B:TERM@" in file.read_text()


def test_presets_are_the_recipe() -> None:
    for name, model in (("paper-2b", "2B"), ("paper-7b", "7B")):
        made = configuration.parse(contrastive.PRESETS, "", ["--config", name, "--seed", "3"])
        assert model in made.model and made.seed == 3
        assert (made.global_batch, made.temperature) == (8192, 0.02)
        assert (made.tuning.method, made.tuning.rank, made.tuning.alpha) == ("lora", 16, 64)
        assert made.global_batch % made.sub_batch == 0
    assert configuration.parse(sft.PRESETS, "", ["--config=paper-2b"]).optimiser.lr == 2e-5
    with pytest.raises(InvalidInputError, match="builtin, paper-2b, paper-7b"):
        configuration.parse(contrastive.PRESETS, "", ["--config", "big"])


def test_programs_for_cpus_do_without_avx512_unless_somebody_says_otherwise(monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for before, after in (
        ({}, "--xla_cpu_max_isa=AVX2"),
        ({"XLA_FLAGS": "--xla_dump_to=/x"}, "--xla_dump_to=/x --xla_cpu_max_isa=AVX2"),
        ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX512"}, "--xla_cpu_max_isa=AVX512"),
    ):
        env = dict(before)
        launch.without_avx512(env)
        assert env["XLA_FLAGS"] == after
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    env = {}
    launch.without_avx512(env)
    assert env == {}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_arrays_stay_with_the_process() -> None:
    program = """
import sys, numpy as np
from pathlib import Path
from training import launch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

import jax
jax.devices()
if sys.argv[1] == "kept":
    launch.keep_freed_memory()
before = resident()
array = np.ones(16 << 20)  # 128 MiB
del array
print(resident() - before)
"""
    left = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", program, how],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for how in ("given back", "kept")
    }
    assert left["given back"] < 16 << 20
    assert left["kept"] > 100 << 20
