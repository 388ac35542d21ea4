"""The 24 page tasks: BEIR-style `queries`, `qrels` and `corpus`, with the pages in the rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from tte_jax.content import Content
from tte_jax.errors import DataLossError
from tte_jax.evaluation.mmeb_v2.files import read_rows
from tte_jax.evaluation.mmeb_v2.reading import Source, make_task
from tte_jax.evaluation.task import EvalTask, Item, Query


def read(source: Source) -> EvalTask:
    """Queries and grades at once; pages one after the other when the candidates are asked for.

    A grade of 0 or less is none; of two grades for one page the higher counts. Queries without any
    page are left out, and said so.

    Raises MissingDataError, DataLossError.
    """
    info, root = source.info, source.root
    grades: dict[str, dict[str, float]] = {}
    columns = ("query-id", "corpus-id", "score")
    for row in read_rows(info, root, config="qrels", columns=columns):
        if row["score"] > 0:
            mine = grades.setdefault(str(row["query-id"]), {})
            page = str(row["corpus-id"])
            mine[page] = max(mine.get(page, 0), row["score"])
    queries: list[Query] = []
    unjudged = 0
    rows = read_rows(info, root, config="queries", columns=("query-id", "query"))
    for row in source.first(rows):
        id = str(row["query-id"])
        if id not in grades:
            unjudged += 1
            continue
        queries.append(
            Query(
                id,
                partial(Content.of, row["query"]),
                tuple(grades[id]),
                tuple(grades[id].values()),
                instruction=source.query_instruction,
            )
        )
    notes = [f"{unjudged} queries without a relevant page are left out"] if unjudged else []
    return make_task(source, queries, partial(_pages, source), notes)


def _pages(source: Source) -> Iterator[Item]:
    seen: set[str] = set()
    columns = ("corpus-id", "image")
    for row in read_rows(source.info, source.root, config="corpus", columns=columns):
        id = str(row["corpus-id"])
        if id not in seen:
            seen.add(id)
            data = _bytes(row["image"], id, source)
            yield Item(id, partial(Content.of, "", data), source.target_instruction)


def _bytes(image: Any, id: str, source: Source) -> bytes:
    """An image as `datasets` stores it: a struct of bytes and path, or the bytes themselves."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or not data:
        raise DataLossError(
            f"{source.info.name}: page {id!r} of {source.info.repo} has no image bytes in its row; "
            "expected the published parquet files, which hold them. Download them again.",
            reason="UNREADABLE_DATA",
        )
    return data
