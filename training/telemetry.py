"""What a run says about itself: JSON lines, TensorBoard, and a progress bar on a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tte_jax.errors import InternalError


class Telemetry:
    """Writes one row a report; every process may have one, but only process 0 writes.

    Args:
      out: folder of the run; `metrics.jsonl` and TensorBoard's files go there.
      steps: for the bar.
      first: the step that a resumed run starts at; later rows of an earlier attempt are dropped, so
        that no step stands there twice.
      shows: a progress bar on a terminal, elsewhere a line for each report; False = neither.
    """

    def __init__(
        self, out: Path, *, steps: int, first: int = 0, writes: bool = True, shows: bool = True
    ) -> None:
        self._writes, self._shows = writes, shows
        self._bar: Progress | None = None
        self._said = ""
        if not writes:
            return
        from tensorboardX import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "metrics.jsonl"
        _drop_after(self._path, first)
        self._log = self._path.open("a")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
        if shows and sys.stderr.isatty():
            from rich.console import Console

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=steps, completed=first, said="")

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """One row.

        Raises:
          InternalError: a loss or a gradient that is not finite; whatever is not a number stands
            in the row.
        """
        if not self._writes:
            return
        row = {"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._said = f"loss {values.get('loss', math.nan):.4g}"
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        lost = [n for n in ("loss", "grad_norm") if not math.isfinite(values.get(n, 0.0))]
        if lost:
            what = {"loss": "loss", "grad_norm": "norm of the gradient"}[lost[0]]
            raise InternalError(
                f"the {what} is {values[lost[0]]} at step {step}: {row}. Lower the learning rate,"
                " or look for broken examples with `tte data check`; the newest checkpoint is from"
                " before.",
                reason="LOSS_NOT_FINITE",
            )
        if self._shows and self._bar is None:
            said = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if "/" not in k)
            print(f"{time.strftime('%H:%M:%S')} step {step}  {said}", flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar; `report` says more."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=self._said)

    def close(self) -> None:
        if not self._writes:
            return
        self._log.close()
        self._board.close()
        if self._bar is not None:
            self._bar.stop()


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    lines = path.read_text().splitlines()
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if row.get("step", 0) <= step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept))
