"""Reasoner stages that the evaluation puts in front of the real one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tte_jax.content import NO_REASONING, Content, Reasoning, Side, Task, Usage
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.evaluation.arms import Ecr
from tte_jax.json_lines import json_lines
from tte_jax.preprocess.ecr import parse_ecr
from tte_jax.stages import ReasonerStage, ReasonItem


class Trimmed:
    """Lets only a part of each ECR through: the thinking, or the answer line."""

    def __init__(self, inner: ReasonerStage, part: Ecr) -> None:
        self.inner, self.part = inner, part

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        found, usage = await self.inner.reason(items, max_tokens=max_tokens, timeout_s=timeout_s)
        # A rewrite is read by the reranker alone, and whole.
        cut = [
            r if item.task is Task.REWRITE else trim(r, self.part)
            for r, item in zip(found, items, strict=True)
        ]
        return cut, usage


def trim(reasoning: Reasoning, part: Ecr) -> Reasoning:
    """The reasoning with only `part` left of its text; the tokens that it cost stay."""
    if part is Ecr.ANSWER:
        text = f"Answer: {reasoning.answer}" if reasoning.answer else ""
        return replace(reasoning, text=text, think="")
    if part is Ecr.THINK:
        text = f"<think>{reasoning.think}</think>" if reasoning.think else ""
        return replace(reasoning, text=text, answer="")
    return reasoning


class Cached:
    """Keeps the ECRs of documents in a file, so that arms share them and a run can go on.

    Queries and rewrites always run: their tokens and seconds are what is measured.

    Args:
      path: JSON lines, appended to.
      models: what makes them, as the settings name it; others' ECRs are not used.
    """

    def __init__(self, inner: ReasonerStage, path: Path, *, models: str) -> None:
        self.inner, self.path, self.models = inner, path, models
        self.known: dict[str, Reasoning] = {}
        if path.is_file():
            for line in json_lines(path.read_text("utf-8")):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the last line of a run that was killed
                key = row.pop("key")
                self.known[key] = Reasoning(**row)

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        keys = [self._key(item, max_tokens) for item in items]
        wanted = [i for i, k in enumerate(keys) if k is None or k not in self.known]
        usage, fresh = Usage("reason"), dict[int, Reasoning]()
        if wanted:
            found, usage = await self.inner.reason(
                [items[i] for i in wanted], max_tokens=max_tokens, timeout_s=timeout_s
            )
            fresh = dict(zip(wanted, found, strict=True))
            self._store({k: fresh[i] for i in wanted if (k := keys[i]) is not None})
        answers = [fresh[i] if i in fresh else self.known[keys[i] or ""] for i in range(len(items))]
        return answers, usage

    def _store(self, made: Mapping[str, Reasoning]) -> None:
        if not made:
            return
        self.known.update(made)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, reasoning in made.items():
                row = {"key": key, **asdict(reasoning)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _key(self, item: ReasonItem, max_tokens: int) -> str | None:
        if not item.background:
            return None
        parts = (item.content.content_hash, item.instruction, str(max_tokens), self.models)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Recorded:
    """ECRs that another system wrote, in place of a reasoner.

    The file has a JSON object per line: `task`, `side` ("query" or "target"), `id` (the query's
    number in its file, or the candidate's name) and `ecr`. Rewrites cannot be recorded.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NotFoundError(f"There is no file of ECRs {path}.", reason="FILE_NOT_FOUND")
        self.rows: dict[tuple[str, str, str], str] = {}
        self.by_content: dict[tuple[Side, str], Reasoning] = {}
        for number, line in enumerate(json_lines(path.read_text("utf-8")), start=1):
            try:
                row = json.loads(line)
                side, ecr = row["side"], row["ecr"]
                if side not in ("query", "target") or not isinstance(ecr, str):
                    raise ValueError("side must be query or target, and ecr a text")
                self.rows[str(row["task"]), side, str(row["id"])] = ecr
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInputError(
                    f"{path}, line {number}: {type(error).__name__}: {error}. Expected "
                    '{"task": "MSVD", "side": "target", "id": "v1", "ecr": "…"}.',
                    field="--ecrs",
                ) from None

    def offer(self, task: str, side: Side, id: str, content: Content) -> None:
        """Says which content the recorded ECR of `id` belongs to, before it is asked for."""
        key = (task, "query" if side is Side.QUERY else "target", id)
        text = self.rows.get(key, "")
        self.by_content[side, content.content_hash] = parse_ecr(text) if text else NO_REASONING

    def count(self, task: str, side: Side, ids: Collection[str]) -> tuple[int, int]:
        """(recorded, asked for): of how many of a side's `ids` there is an ECR.

        Raises InvalidInputError where there is none of them, though the file has some of this task
        and side, or has nothing at all of the task.
        """
        name = "query" if side is Side.QUERY else "target"
        recorded = sum((task, name, id) in self.rows for id in ids)
        of_task = [key for key in self.rows if key[0] == task]
        of_side = [id for _, other, id in of_task if other == name]
        if ids and not recorded and (of_side or not of_task):
            what = (
                f"{len(of_side)} with other ids, such as {of_side[0]!r}" if of_side else "nothing"
            )
            kind = "the queries' numbers" if side is Side.QUERY else "the candidates' names"
            raise InvalidInputError(
                f"{task}: no recorded ECR (--ecrs) is of its {name} side: the file has {what}; "
                f"expected {kind}, such as {next(iter(ids))!r}.",
                field="--ecrs",
                reason="NO_RECORDED_ECR",
            )
        return recorded, len(ids)

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        del max_tokens, timeout_s
        if any(item.task is Task.REWRITE for item in items):
            raise InvalidInputError(
                "Recorded ECRs (--ecrs) hold no rewrites; use --rerank off or ecrr.",
                field="--rerank",
            )
        found = [self.by_content.get((i.side, i.content.content_hash), NO_REASONING) for i in items]
        return found, Usage("reason", model_version="recorded")
