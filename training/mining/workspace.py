"""The loop's folder: what is finished, and where everything lies.

config.json                  what the loop is of; another one is refused
table.jsonl                  queries and documents of the data
vectors/round-00000/         of the retriever that mines the round
candidates/round-00000.npy
rounds/round-00000/          sealed negatives
models/round-00000/          the retriever trained on them, and round-00000.json when complete
metrics.jsonl, tensorboard/  what each round was like, see `mining.figures`
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.rows import ExampleSource
from training.mining import table as tables
from training.mining.rounds import name_of
from training.mining.table import Table
from tte_jax.corpus.durable import fsync_directory, fsync_file, write_atomically
from tte_jax.corpus.lock import WriterLock
from tte_jax.errors import DataLossError, PreconditionError

COMPARED = 64
"""Examples that are compared with the table when a loop goes on."""


@dataclass(frozen=True)
class Workspace:
    """Paths below one folder, and the marks of what is complete.

    Attributes:
      root: the folder.
      export: where a trainer leaves the model directory below the folder it is given.
    """

    root: Path
    export: str = ""

    @property
    def rounds(self) -> Path:
        return self.root / "rounds"

    @property
    def table_path(self) -> Path:
        return self.root / "table.jsonl"

    def vectors(self, round: int) -> Path:
        return self.root / "vectors" / name_of(round)

    def candidates(self, round: int) -> Path:
        return self.root / "candidates" / f"{name_of(round)}.npy"

    def round(self, round: int) -> Path:
        return self.rounds / name_of(round)

    def model(self, round: int) -> Path:
        """Folder that the trainer of a round is given."""
        return self.root / "models" / name_of(round)

    def retriever(self, round: int) -> Path:
        """Model directory of the retriever trained on a round."""
        return self.model(round) / self.export

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One loop at a time. Raises PreconditionError (`LOOP_RUNNING`) while another one runs."""
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            lock = WriterLock(self.root / ".loop")
        except PreconditionError as error:
            raise PreconditionError(
                f"process {error.metadata.get('holder', 'unknown')} runs the loop in {self.root}. "
                "Wait for it, or give another folder.",
                reason="LOOP_RUNNING",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Begins with these settings, or goes on with the same.

        Raises PreconditionError (`SETTINGS_CHANGED`) when the folder was begun with others.
        """
        path = self.root / "config.json"
        wanted = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if not path.exists():
            write_atomically(path, wanted.encode())
        begun = json.loads(path.read_text())
        if begun != json.loads(wanted):
            changed = {
                name: (begun.get(name), settings.get(name))
                for name in {*begun, *settings}
                if begun.get(name) != json.loads(wanted).get(name)
            }
            raise PreconditionError(
                f"{self.root} was begun with other settings (before, now): {changed}. Go on with "
                "those, or give another folder.",
                reason="SETTINGS_CHANGED",
            )

    def table(self, source: ExampleSource, *, reranks: bool = False) -> Table:
        """Read from the folder, else made from the source and kept.

        Args:
          reranks: a reranker will read it.

        Raises:
          InvalidInputError (`NO_TEXT`): it would find nothing to read. No table is kept then.
          PreconditionError (`DATA_CHANGED`): the data are not what the table was made of, as far as
            their number and some examples tell.
        """
        if not self.table_path.exists():
            made = tables.table_of(source)
            if reranks:
                tables.check_texts(made)
            tables.save(made, self.table_path)
            return made
        table = tables.load(self.table_path)
        if len(table.queries) != len(source):
            raise PreconditionError(
                f"{self.table_path} is of {len(table.queries)} examples, and the data have "
                f"{len(source)}. Restore the data, or give another folder.",
                reason="DATA_CHANGED",
            )
        for index in np.unique(np.linspace(0, len(source) - 1, COMPARED, dtype=int)).tolist():
            if changed := tables.difference(table, index, source[index]):
                raise PreconditionError(
                    f"{self.table_path} was made of other data: {changed}. Its vectors and rounds"
                    " are of those. Restore the data, or give another folder.",
                    reason="DATA_CHANGED",
                )
        return table

    def trained(self, round: int) -> bool:
        """Whether the retriever of a round is complete.

        Raises DataLossError when it was, and its files are others now.
        """
        mark = self._mark(round)
        if not mark.exists():
            return False
        if json.loads(mark.read_text())["sha256"] != tree_hash(self.retriever(round)):
            raise DataLossError(
                f"{self.retriever(round)} is not what was trained there: its files have changed. "
                f"Delete {mark.name} beside it, and it is trained again."
            )
        return True

    def mark_trained(self, round: int) -> None:
        """Syncs the model's files, then says that it is complete."""
        folder = self.retriever(round)
        if not folder.is_dir():
            raise PreconditionError(
                f"the trainer ended without an error, but left no folder {folder}",
                reason="TRAINER_LEFT_NOTHING",
            )
        for path in sorted(folder.rglob("*")):
            (fsync_directory if path.is_dir() else fsync_file)(path)
        fsync_directory(folder)
        mark = {"round": round, "sha256": tree_hash(folder)}
        write_atomically(self._mark(round), json.dumps(mark).encode())

    def _mark(self, round: int) -> Path:
        return self.root / "models" / f"{name_of(round)}.json"

    @contextmanager
    def trainer_lock(self) -> Iterator[int]:
        """A file descriptor for the trainer's process to inherit: as long as it lives, the lock
        is held, even when the loop that started it was killed. A new loop waits for that trainer,
        so that two never write one model."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / ".trainer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.2)
            yield handle
        finally:
            os.close(handle)


def tree_hash(folder: Path) -> str:
    """Over the names and contents of all files below a folder."""
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        h.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            h.update(hashlib.file_digest(file, "sha256").digest())
    return h.hexdigest()
