"""ECRs in a file, by what they are about; and a source that reads its ECRs from there.

One JSON object a line: `{"key", "side", "arm", "document", "ecr", "model", "budget"}`. Lines are
only ever appended, and a torn last line (the writer was killed) is cut off when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from training.data.examples import Document, Example
from training.data.rows import ExampleSource, pick
from tte_jax.content import Side
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError

PLAIN, TRUTH = "no-ground-truth", "ground-truth"
"""Arms: whether the prompt showed what is right. They are never in one file."""


@dataclass(frozen=True)
class Ecr:
    """One reasoning.

    Attributes:
      key: see `ecr_key`.
      side: of retrieval.
      arm: PLAIN or TRUTH.
      document: the key of what it is about.
      ecr: the text, tags included.
      model: version of the reasoner that wrote it.
      budget: new tokens that it was allowed.
    """

    key: str
    side: Side
    arm: str
    document: str
    ecr: str
    model: str
    budget: int


def ecr_key(document: Document, side: Side, truth: str = "") -> str:
    """What an ECR answers: content, side, instruction, and the ground truth that was shown."""
    h = hashlib.sha256(document.key.encode())
    for text in (side.value, document.instruction, truth):
        h.update(f"|{len(text)}:{text}".encode())
    return h.hexdigest()


class EcrStore:
    """The file, opened for reading and appending. One arm, one model and one budget.

    Args:
      path: made when `model` is given and it is not there.
      arm, model, budget: what a writer is about to add; "" and 0 = only read.

    Raises:
      NotFoundError: nothing to read.
      InvalidInputError: the file holds another arm, model or budget than is to be added.
      DataLossError: a line before the last is damaged.
    """

    def __init__(self, path: Path, *, arm: str = "", model: str = "", budget: int = 0) -> None:
        self.path = path
        self._known: dict[str, Ecr] = {}
        if not path.exists():
            if not model:
                raise NotFoundError(
                    f"{path} is not there; `python -m training.reason` writes it", path=path
                )
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            self._read(writing=bool(model))
        self._header = (arm, model, budget)
        held = {(e.arm, e.model, e.budget) for e in self._known.values()}
        if len(held | ({self._header} if model else set())) > 1:
            raise InvalidInputError(
                f"{path} holds ECRs of {sorted(held)}, and those to be added are of "
                f"{self._header} (arm, model, budget). Write them to another file.",
                field="out",
            )

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    @property
    def arm(self) -> str:
        """PLAIN or TRUTH; "" of an empty file."""
        return next((e.arm for e in self._known.values()), self._header[0])

    def get(self, key: str) -> str:
        """The ECR's text; "" when there is none."""
        found = self._known.get(key)
        return found.ecr if found is not None else ""

    def shown_truth(self) -> dict[tuple[str, Side], str]:
        """ECRs of the ground-truth arm by document and side, since what was shown is not known to
        a reader; of several, the first."""
        found: dict[tuple[str, Side], str] = {}
        for one in self._known.values():
            if one.arm == TRUTH:
                found.setdefault((one.document, one.side), one.ecr)
        return found

    def append(self, new: Iterable[Ecr]) -> None:
        """Adds and syncs; when it returns, they survive power loss."""
        fresh = [one for one in new if one.key not in self._known]
        with self.path.open("a", encoding="utf-8") as file:
            for one in fresh:
                file.write(json.dumps(vars(one), ensure_ascii=False) + "\n")
                self._known[one.key] = one
            file.flush()
            os.fsync(file.fileno())

    def _read(self, *, writing: bool) -> None:
        whole = 0
        raw = self.path.read_bytes()
        lines = raw.split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                value = json.loads(line)
                one = Ecr(**{**value, "side": Side(value["side"])})
            except (ValueError, TypeError, KeyError) as error:
                raise DataLossError(
                    f"{self.path}:{number} is no ECR ({error}). Remove the line, then run "
                    "`python -m training.reason` again: it writes what is missing.",
                    path=self.path,
                ) from None
            self._known[one.key] = one
            whole += len(line) + 1
        if writing and whole < len(raw):
            os.truncate(self.path, whole)


class WithEcrs:
    """A source whose documents carry the ECRs of a store, each the one that was written for its
    content, side and instruction; what the store lacks stays as it is."""

    def __init__(self, source: ExampleSource, store: EcrStore) -> None:
        self.source = source
        self._store, self._shown = store, store.shown_truth()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return replace(
            example,
            query=self._with(example.query, Side.QUERY),
            positives=tuple(self._with(d, Side.DOCUMENT) for d in example.positives),
            negatives=tuple(self._with(d, Side.DOCUMENT) for d in example.negatives),
        )

    def document(self, index: int, at: int) -> Document:
        return self._with(pick(self.source, index, at), Side.DOCUMENT)

    def _with(self, document: Document, side: Side) -> Document:
        key = ecr_key(document, side)
        if key in self._store:
            return replace(document, ecr=self._store.get(key))
        shown = self._shown.get((document.key, side))
        return document if shown is None else replace(document, ecr=shown)
