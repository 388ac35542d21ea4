"""Generates the package `tte` (messages, stubs, type stubs) from the protos beside this file.

    python protos/generate.py [OUT]      # OUT: folder that holds `tte/`; default: the repository

`make protos` runs it, and a test runs it into an empty folder and compares: what is committed is
what the protos say.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Writes the stubs of every proto under `out` and returns their paths, sorted.

    Raises:
      RuntimeError: protoc failed; it has printed why.
    """
    # The mypy plugins are programs of this interpreter's environment, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    sources = sorted(PROTOS.glob("tte/v1/*.proto"))
    arguments = [
        "protoc",
        f"-I{PROTOS}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *map(str, sources),
    ]
    if code := protoc.main(arguments):
        raise RuntimeError(f"protoc ended with exit code {code}")
    written = []
    for source in sources:
        has_service = "\nservice " in source.read_text()
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            path = out / "tte" / "v1" / f"{source.stem}{suffix}"
            if "_grpc" in suffix and not has_service:
                path.unlink()  # protoc writes an empty module for files without a service
            else:
                written.append(path)
    return sorted(written)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
