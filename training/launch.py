"""Joining the processes of a job: from Slurm's or JobSet's environment, or from options.

    Slurm      srun python -m training.contrastive …             (one task per node or per GPU)
    JobSet     the variables of deploy/jobset/*.yaml: TTE_COORDINATOR, JOB_COMPLETION_INDEX,
               TTE_PROCESSES
    by hand    --job.coordinator HOST:PORT --job.processes N --job.process I

The JobSet files set the environment; which process is which comes from the job's completion index.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from tte_jax.errors import InvalidInputError

PORTS = 4096
FIRST_PORT = 65535 - PORTS + 1

_ISA = "--xla_cpu_max_isa"
# Of glibc's mallopt: no array is mapped by itself (M_MMAP_MAX), the heap's end is never handed back
# (M_TRIM_THRESHOLD), it grows by 256 MiB (M_TOP_PAD), and all threads share it (M_ARENA_MAX).
_KEPT = ((-4, 0), (-1, -1), (-2, 256 << 20), (-8, 1))


def without_avx512(env: MutableMapping[str, str]) -> None:
    """Has XLA compile for AVX2 on x86 CPUs, in this process and those it starts.

    With AVX-512, LLVM cannot select a broadcast of eight bools (jax 0.10.2: `Cannot select …
    SUBV_BROADCAST_LOAD`) and ends the process; the masks of small batches hold such ones.
    Accelerators are not touched, and what `XLA_FLAGS` says already stays. Call before JAX has a
    backend.
    """
    flags = env.get("XLA_FLAGS", "")
    if platform.machine() in ("x86_64", "AMD64") and _ISA not in flags:
        env["XLA_FLAGS"] = f"{flags} {_ISA}=AVX2".strip()


def keep_freed_memory() -> None:
    """Has this process keep what it frees, for its next arrays, where JAX computes on the CPU.

    By itself glibc gives arrays above 32 MiB back to the kernel at once. A step on a CPU makes the
    same ones anew every time, and spends a fifth of its time on having their pages zeroed. Other C
    libraries, and the hosts of accelerators, are left as they are.
    """
    import jax

    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _KEPT:
            mallopt(option, value)


@dataclass(frozen=True)
class Job:
    """Which process of which job this is.

    Attributes:
      coordinator: host:port where process 0 listens; "" = look in the environment.
      processes: of the whole job; 0 = by the environment.
      process: number of this one; -1 = by the environment.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1


def find(given: Job, env: Mapping[str, str]) -> Job | None:
    """The job, or None for a process by itself. Options come before the environment.

    Raises:
      InvalidInputError: half of what is needed is there.
    """
    if given.coordinator:
        return _complete(given, "--job.coordinator")
    if env.get("TTE_COORDINATOR"):
        number = env.get("TTE_PROCESS", env.get("JOB_COMPLETION_INDEX", "-1"))
        found = Job(
            env["TTE_COORDINATOR"], _int(env, "TTE_PROCESSES", "0"), _number(number, "TTE_PROCESS")
        )
        return _complete(found, "TTE_COORDINATOR")
    if _int(env, "SLURM_NTASKS", "1") > 1 and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        # Jobs that share a node must not share a port.
        port = FIRST_PORT + _int(env, "SLURM_JOB_ID", "0") % PORTS
        found = Job(
            f"{first_host(nodes)}:{port}",
            _int(env, "SLURM_NTASKS", "1"),
            _int(env, "SLURM_PROCID", "-1"),
        )
        return _complete(found, "SLURM_JOB_NODELIST")
    return None


def initialise(given: Job) -> None:
    """Makes this process part of its job, before anything touches a device.

    Raises:
      InvalidInputError: as `find`.
    """
    job = find(given, os.environ)
    if job is None:
        return
    import jax

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(job.coordinator, job.processes, job.process)


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: "gpu[003-005,9],login" → "gpu003".

    Raises InvalidInputError for an empty or unbalanced list.
    """
    found = re.match(r"^([^,\[\]\s]+)(?:\[(\d+)[^\]]*\])?(?=,|\[|$|-)?([^,\[\]]*)", nodes)
    if not found or nodes.count("[") != nodes.count("]"):
        raise InvalidInputError(
            f"the node list {nodes!r} is not understood; give --job.coordinator HOST:PORT",
            field="job.coordinator",
        )
    return found[1] + (found[2] or "") + (found[3] or "")


def _complete(job: Job, where: str) -> Job:
    if job.processes < 1 or not 0 <= job.process < job.processes or ":" not in job.coordinator:
        raise InvalidInputError(
            f"{where} names a job, but coordinator {job.coordinator!r}, processes {job.processes}"
            f" and process {job.process} do not fit together; expected HOST:PORT, the number of"
            " processes, and one from 0 to one less. Set all three (--job.coordinator,"
            " --job.processes, --job.process, or TTE_COORDINATOR, TTE_PROCESSES and TTE_PROCESS).",
            field="job",
        )
    return job


def _int(env: Mapping[str, str], name: str, default: str) -> int:
    return _number(env.get(name, default), name)


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{name} is {text!r}, expected a number", field=name) from None
