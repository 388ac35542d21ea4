"""What mining knows of a training set: its queries, its distinct documents, and which are right.

Made by one reading of the source, which opens every medium, and kept in a file, so that neither the
miner nor a trainer has to read it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.data.examples import Document, Example
from training.data.rows import ExampleSource, pick
from tte_jax.cascade.texts import rerank_text
from tte_jax.corpus.durable import write_atomically
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError, PreconditionError
from tte_jax.preprocess.ecr import parse_ecr

_FORMAT = 1


@dataclass(frozen=True)
class QueryEntry:
    """An example as mining sees it.

    Attributes:
      key: the example's key, unique within its data set.
      dataset: number of its data set.
      text: what the reranker reads: the ECR without its tags, else the query's text.
      instruction: of the query.
      group: "" = none.
      positives: its right documents, numbers into `Table.documents`; the first is scored.
    """

    key: str
    dataset: int
    text: str
    instruction: str
    group: str
    positives: tuple[int, ...]


@dataclass(frozen=True)
class DocumentEntry:
    """A distinct document of one data set.

    Attributes:
      key: as `Document.key`.
      dataset: number of its data set.
      text: what the reranker reads.
      groups: of the examples that it answers.
      example, at: where it stands in the source, see `rows.pick`.
    """

    key: str
    dataset: int
    text: str
    groups: tuple[str, ...]
    example: int
    at: int


@dataclass(frozen=True)
class Table:
    """Queries in the source's order; documents in the order in which they first appear.

    Attributes:
      fingerprint: a hash over everything in the table.
    """

    datasets: tuple[str, ...]
    queries: tuple[QueryEntry, ...]
    documents: tuple[DocumentEntry, ...]
    fingerprint: str

    def is_right(self, query: QueryEntry, document: int) -> bool:
        """Whether a document is known to answer a query, and can be no negative of it."""
        groups = self.documents[document].groups
        return document in query.positives or (query.group != "" and query.group in groups)

    def document(self, source: ExampleSource, number: int) -> Document:
        """Reads a document out of the source that the table was made of.

        Raises PreconditionError when another document stands there by now.
        """
        entry = self.documents[number]
        found = pick(source, entry.example, entry.at)
        if found.key != entry.key:
            raise PreconditionError(
                f"document {number} has changed since the table was made: example {entry.example} "
                f"of the data holds {found.key[:12]} where {entry.key[:12]} was. Mine again in a "
                "new folder, or restore the data.",
                reason="DATA_CHANGED",
            )
        return found


def table_of(source: ExampleSource) -> Table:
    """Reads a source once.

    Raises:
      InvalidInputError: two examples of one data set have one key.
      NotFoundError, DataLossError: as the source.
    """
    datasets: dict[str, int] = {}
    queries: list[QueryEntry] = []
    numbers: dict[tuple[int, str], int] = {}
    documents: list[tuple[str, int, str, dict[str, None], int, int]] = []
    keys: set[tuple[int, str]] = set()
    for index in range(len(source)):
        example = source[index]
        dataset = datasets.setdefault(example.dataset, len(datasets))
        if (dataset, example.key) in keys:
            raise InvalidInputError(
                f"two examples of {example.dataset} have the key {example.key!r}; "
                "`tte data check` lists them",
                field="key",
            )
        keys.add((dataset, example.key))
        there: list[int] = []
        for at, one in enumerate((*example.positives, *example.negatives)):
            number = numbers.setdefault((dataset, one.key), len(documents))
            if number == len(documents):
                documents.append((one.key, dataset, text_of(one), {}, index, at))
            if at < len(example.positives):
                there.append(number)
                if example.group:
                    documents[number][3][example.group] = None
        queries.append(_query(example, dataset, tuple(there)))
    entries = tuple(
        DocumentEntry(key, dataset, text, tuple(groups), example, at)
        for key, dataset, text, groups, example, at in documents
    )
    h = hashlib.sha256()
    for line in _lines(tuple(datasets), tuple(queries), entries):
        h.update(line.encode() + b"\n")
    return Table(tuple(datasets), tuple(queries), entries, h.hexdigest())


def check_texts(table: Table) -> None:
    """Raises InvalidInputError (`NO_TEXT`) when a query or the positive that is scored has no text
    for a reranker to read."""
    for query in table.queries:
        positive = table.documents[query.positives[0]]
        for name, read in (("query", query.text), ("positive", positive.text)):
            if not read.strip():
                raise InvalidInputError(
                    f"the {name} of {table.datasets[query.dataset]}/{query.key} has no text, and"
                    " the reranker reads nothing else. Give it an ECR: `python -m training.reason`"
                    " writes them.",
                    field=name,
                    reason="NO_TEXT",
                )


def difference(table: Table, index: int, example: Example) -> str:
    """How an example differs from what the table says of it; "" = not at all."""
    query = table.queries[index]
    where = f"example {index} ({table.datasets[query.dataset]}/{query.key})"
    asked = (query.key, query.text, query.instruction, query.group)
    found = example.query
    if (example.key, text_of(found), found.instruction, example.group) != asked:
        return f"{where} asks something else, or has another ECR, key or group"
    known = [table.documents[i] for i in query.positives]
    if [one.key for one in example.positives] != [one.key for one in known]:
        return f"{where} has other positives"
    for one, document in zip(example.positives, known, strict=True):
        # What the table keeps of a document is from where it stands first.
        if document.example == index and text_of(one) != document.text:
            return f"a positive of {where} has another ECR"
    return ""


def _query(example: Example, dataset: int, positives: tuple[int, ...]) -> QueryEntry:
    query = example.query
    return QueryEntry(
        example.key, dataset, text_of(query), query.instruction, example.group, positives
    )


def text_of(document: Document) -> str:
    """What the text-only reranker reads of a query or document; "" for media without an ECR."""
    return rerank_text(parse_ecr(document.ecr), document.content)


def save(table: Table, path: Path) -> None:
    """Whole or not at all."""
    lines = _lines(table.datasets, table.queries, table.documents)
    body = "\n".join([*lines, json.dumps({"fingerprint": table.fingerprint})])
    write_atomically(path, body.encode() + b"\n")


def load(path: Path) -> Table:
    """Raises DataLossError when the file is not what `save` wrote."""
    lines = path.read_text("utf-8").splitlines()
    h = hashlib.sha256()
    for line in lines[:-1]:
        h.update(line.encode() + b"\n")
    try:
        fingerprint = json.loads(lines[-1])["fingerprint"]
        head = json.loads(lines[0])
    except (IndexError, ValueError, KeyError, TypeError):
        fingerprint, head = "", {}
    if fingerprint != h.hexdigest() or head.get("format") != _FORMAT:
        raise DataLossError(
            f"{path} is damaged, or of another version. Delete it; it is made again from the data.",
            path=path,
        )
    rows = [json.loads(line) for line in lines[1:-1]]
    split = head["queries"]
    queries = tuple(
        QueryEntry(row[0], row[1], row[2], row[3], row[4], tuple(row[5])) for row in rows[:split]
    )
    documents = tuple(
        DocumentEntry(row[0], row[1], row[2], tuple(row[3]), row[4], row[5]) for row in rows[split:]
    )
    return Table(tuple(head["datasets"]), queries, documents, fingerprint)


def table_beside(round: Path) -> Table:
    """The table of the loop that a round's folder lies in.

    Raises NotFoundError when it is not there; else as `load`.
    """
    path = round.absolute().parent.parent / "table.jsonl"
    if not path.is_file():
        raise NotFoundError(
            f"{path} is not there, and it says what {round} was mined from: a round is read where"
            " the loop sealed it, or from a copy of the loop's folder with its table.jsonl",
            path=path,
        )
    return load(path)


def _lines(
    datasets: tuple[str, ...],
    queries: tuple[QueryEntry, ...],
    documents: tuple[DocumentEntry, ...],
) -> Iterator[str]:
    head = {"format": _FORMAT, "datasets": datasets, "queries": len(queries)}
    yield json.dumps(head, ensure_ascii=True)
    for entry in (*queries, *documents):
        # ASCII, since some characters would count as ends of lines.
        yield json.dumps(list(vars(entry).values()), ensure_ascii=True)
