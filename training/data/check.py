"""Looks for what spoils a training run before it starts.

    python -m training.data.check jsonl:birds.jsonl --eval jsonl:birds_test.jsonl

| finding | severity | what it means |
|---|---|---|
| invalid_row | error | a row that no trainer could use |
| missing_media | error | a file that is not there, is empty, or (with --decode) cannot be decoded |
| repeated_key | error | two examples of one data set with the same key: their negatives would mix |
| duplicate_example | error | the same query with the same target twice |
| negative_is_target | error | a negative that some row calls right for that query or group |
| target_in_query | error | the target's text stands in the query's text |
| target_in_ecr | error | the target's text stands in the query's ECR, yet not in the query |
| eval_query | error | a query that the evaluation asks too |
| eval_target | error | a document that the evaluation has too |
| ambiguous_query | note | one query with several targets that no group joins |
| shared_target | note | a target of several queries that no group joins (masked in a batch) |

Exit codes: 0 nothing found but notes; 1 errors found; 2 the data cannot be read as named; 3 not
found.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.ecrs import WithEcrs
from training.data.examples import Example
from training.data.mixture import Mixture, Subset
from training.data.rows import ExampleSource, Item, MediaFile, Row, RowSource
from training.data.sources import open_source
from tte_jax.cli import exits
from tte_jax.content import MediaKind
from tte_jax.errors import InvalidInputError, TteError

ERRORS = (
    "invalid_row", "missing_media", "repeated_key", "duplicate_example", "negative_is_target",
    "target_in_query", "target_in_ecr", "eval_query", "eval_target",
)  # fmt: skip
NOTES = ("ambiguous_query", "shared_target")
SHOWN = 5
# A target of one or two letters ("A", "no") stands in nearly every text.
_SHORTEST_LEAK = 3


@dataclass
class Report:
    """What was found: how often, and the first few places of each kind."""

    examples: int = 0
    datasets: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def add(self, finding: str, where: str) -> None:
        self.counts[finding] += 1
        places = self.shown.setdefault(finding, [])
        if len(places) < SHOWN:
            places.append(where)

    def errors(self, allowed: Sequence[str] = ()) -> int:
        return sum(self.counts[name] for name in ERRORS if name not in allowed)

    def to_json(self, allowed: Sequence[str]) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "datasets": dict(self.datasets),
            "errors": self.errors(allowed),
            "allowed": list(allowed),
            "findings": {
                name: {
                    "severity": "error" if name in ERRORS else "note",
                    "count": self.counts[name],
                    "share": self.counts[name] / max(1, self.examples),
                    "first": self.shown[name],
                }
                for name in (*ERRORS, *NOTES)
                if self.counts[name]
            },
        }


def check(
    source: ExampleSource,
    *,
    evaluation: ExampleSource | None = None,
    decode: bool = False,
) -> Report:
    """Reads every row once; media are only looked at with `decode`.

    Args:
      evaluation: examples that must not be trained on.
      decode: open every image, which is slow and finds truncated ones.
    """
    report = Report()
    # Two files of one picture are told to be the same only by reading them.
    keys = _Keys(contents=evaluation is not None)
    seen = _Seen(keys)
    asked, held = _evaluation_keys(evaluation, keys)
    files: dict[tuple[Any, ...], bool] = {}
    for index in range(len(source)):
        report.examples += 1
        try:
            row = row_at(source, index)
        except InvalidInputError as error:
            report.add("invalid_row", error.message)
            continue
        where = f"{row.dataset}/{row.key}"
        report.datasets[row.dataset] += 1
        _check_media(row, where, report, decode, files)
        _check_leaks(row, where, report)
        seen.check(row, where, report)
        if evaluation is not None:
            if keys.of(row.query) in asked:
                report.add("eval_query", where)
            if any(keys.of(item) in held for item in row.positives):
                report.add("eval_target", where)
    seen.finish(report)
    return report


def row_at(source: ExampleSource, index: int) -> Row:
    """The row behind an example, with the ECRs that the source adds to it.

    A source without rows is read, and its media stand in the row with their bytes.
    """
    if isinstance(source, WithEcrs):
        row = row_at(source.source, index)
        try:
            example = source[index]
        except TteError:  # its media are missing, which is reported as such
            return row
        return replace(
            row,
            query=replace(row.query, ecr=example.query.ecr),
            positives=tuple(
                replace(item, ecr=d.ecr)
                for item, d in zip(row.positives, example.positives, strict=True)
            ),
        )
    if isinstance(source, Mixture):
        part, at = source.place(index)
        return replace(row_at(source.parts[part].source, at), dataset=source.parts[part].name)
    if isinstance(source, Subset):
        return row_at(source.source, source.indices[index])
    if isinstance(source, RowSource):
        return source.row(index)
    return _as_row(source[index])


def _as_row(example: Example) -> Row:
    def item(document: Any) -> Item:
        media = tuple(MediaFile(None, m.kind, m.page, m.data) for m in document.content.media)
        return Item(document.content.text, media, document.instruction, document.ecr)

    return Row(
        key=example.key,
        dataset=example.dataset,
        query=item(example.query),
        positives=tuple(item(d) for d in example.positives),
        negatives=tuple(item(d) for d in example.negatives),
        group=example.group,
    )


class _Keys:
    """Keys of items: by the names of their files, or by what is in them, each file read once."""

    def __init__(self, *, contents: bool) -> None:
        self._contents = contents
        self._hashes: dict[Path, str] = {}

    def of(self, item: Item) -> str:
        if not self._contents:
            return item.name_key
        named = [(one.kind, one.page, self._hash(one)) for one in item.media]
        return f"{named}|{item.text}"

    def _hash(self, one: MediaFile) -> str:
        if one.path is None:
            return hashlib.sha256(one.data or b"").hexdigest()
        if one.path not in self._hashes:
            # A folder of frames, or a file that is missing and reported as such, is its name.
            whole = one.path.read_bytes() if one.path.is_file() else str(one.path).encode()
            self._hashes[one.path] = hashlib.sha256(whole).hexdigest()
        return self._hashes[one.path]


class _Seen:
    """Keys over all rows. Keys are 32 bytes a document, so a million rows take some 200 MB."""

    def __init__(self, keys: _Keys) -> None:
        self._of = keys.of
        self._keys: set[tuple[str, str]] = set()
        self._pairs: set[tuple[str, str, str]] = set()
        self._targets: dict[tuple[str, str], dict[str, str]] = {}
        self._queries: dict[tuple[str, str], dict[str, str]] = {}
        self._right: dict[tuple[str, str, str], set[str]] = {}
        self._negatives: list[tuple[str, list[tuple[str, str, str]], tuple[str, ...]]] = []

    def check(self, row: Row, where: str, report: Report) -> None:
        if (row.dataset, row.key) in self._keys:
            report.add("repeated_key", where)
        self._keys.add((row.dataset, row.key))
        # An instruction is part of what is asked, not of what a document is.
        query = f"{self._of(row.query)}|{row.query.instruction}"
        targets = [self._of(item) for item in row.positives]
        negatives = tuple(self._of(item) for item in row.negatives)
        asked = [(row.dataset, "query", query)]
        asked += [(row.dataset, "group", row.group)] if row.group else []
        if set(negatives) & set(targets):
            report.add("negative_is_target", where)
        elif negatives:
            self._negatives.append((where, asked, negatives))
        for target in targets:
            if (row.dataset, query, target) in self._pairs:
                report.add("duplicate_example", where)
            self._pairs.add((row.dataset, query, target))
            group = row.group or f"query:{query}"
            self._targets.setdefault((row.dataset, target), {}).setdefault(group, where)
            self._queries.setdefault((row.dataset, query), {}).setdefault(
                row.group or f"target:{target}", where
            )
            for one in asked:
                self._right.setdefault(one, set()).add(target)

    def finish(self, report: Report) -> None:
        for where, asked, negatives in self._negatives:
            if any(set(negatives) & self._right[one] for one in asked if one in self._right):
                report.add("negative_is_target", where)
        for finding, found in (
            ("ambiguous_query", self._queries), ("shared_target", self._targets),
        ):  # fmt: skip
            for groups in found.values():
                if len(groups) > 1:
                    report.add(finding, " and ".join(list(groups.values())[:2]))


def _check_media(
    row: Row, where: str, report: Report, decode: bool, known: dict[tuple[Any, ...], bool]
) -> None:
    for item in (row.query, *row.positives, *row.negatives):
        for one in item.media:
            name = (one.path, one.kind, one.page)
            if one.path is None or name not in known:
                known[name] = one.there and (not decode or _decodes(one))
            if not known[name]:
                report.add("missing_media", f"{where}: {one.path or 'inline bytes'}")


def _decodes(one: MediaFile) -> bool:
    if one.kind is not MediaKind.IMAGE:
        return True
    try:
        with Image.open(io.BytesIO(one.load().data)) as image:
            image.load()
    except (OSError, TteError, Image.DecompressionBombError):
        return False
    return True


def _check_leaks(row: Row, where: str, report: Report) -> None:
    for item in row.positives:
        target = _words(item.text)
        if len(target) - 2 < _SHORTEST_LEAK:
            continue
        if target in _words(row.query.text):
            report.add("target_in_query", f"{where}: {item.text!r}")
        elif target in _words(row.query.ecr):
            report.add("target_in_ecr", f"{where}: {item.text!r}")


def _words(text: str) -> str:
    """Lower-case words with one space around each, so that `in` looks for whole words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def _evaluation_keys(source: ExampleSource | None, keys: _Keys) -> tuple[set[str], set[str]]:
    asked: set[str] = set()
    held: set[str] = set()
    for index in range(len(source) if source is not None else 0):
        assert source is not None
        row = row_at(source, index)
        asked.add(keys.of(row.query))
        held.update(keys.of(item) for item in (*row.positives, *row.negatives))
    return asked, held


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.check", description="Checks training data before a run."
    )
    parser.add_argument("data", help="KIND:PATH?OPTION=VALUE, see docs/training.md")
    parser.add_argument("--eval", default="", help="examples that must not be trained on")
    parser.add_argument("--decode", action="store_true", help="open every image")
    parser.add_argument(
        "--allow", action="append", default=[], choices=ERRORS, help="count it as a note"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(arguments)
    try:
        evaluation = open_source(options.eval) if options.eval else None
        report = check(open_source(options.data), evaluation=evaluation, decode=options.decode)
    except TteError as error:
        code = exits.exit_code(error)
        print(f"Error: {error.message}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": {"reason": error.reason, "message": error.message}}))
        return code
    made = report.to_json(options.allow)
    if options.json:
        print(json.dumps(made, ensure_ascii=False, indent=2))
    else:
        print(f"{report.examples} examples of {len(report.datasets)} data sets")
        for name, found in made["findings"].items():
            error = found["severity"] == "error" and name not in options.allow
            print(f"{'error' if error else 'note ':5} {name}: {found['count']}")
            for place in found["first"]:
                print(f"        {place}")
        print("errors found" if made["errors"] else "fit to train on")
    return exits.FAILED if made["errors"] else exits.OK


if __name__ == "__main__":
    sys.exit(main())
