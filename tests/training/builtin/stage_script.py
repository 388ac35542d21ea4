"""A stage for the tests: counts to a number, one line a step, and goes on where it stopped.

STAGE_PAUSE=SECONDS_A_STEP python -m tests.training.builtin.stage_script FILE STEPS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(file: str, steps: str) -> int:
    partial, pause = Path(file + ".partial"), float(os.environ.get("STAGE_PAUSE", "0"))
    Path(file + ".pid").write_text(str(os.getpid()))
    done = len(partial.read_text().splitlines()) if partial.exists() else 0
    # As `training.stopping`, which would import JAX.
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    for step in range(done, int(steps)):
        time.sleep(pause)
        with partial.open("a") as out:
            out.write(f"{step}\n")
        if asked:
            Path(file + ".asked").touch()
            return 128 + asked[0]
    partial.rename(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
