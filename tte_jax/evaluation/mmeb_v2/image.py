"""The 36 image tasks: `qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text[], tgt_img_path[]`.

A row is a query with its own candidates; the first of them is the right one. Candidates that are
texts are named by their text, images by their path, and where both sides are images by
`path:caption`, since one image may hold several objects to be found.
"""

from __future__ import annotations

from typing import Any

from tte_jax.evaluation.mmeb_v2.files import read_rows
from tte_jax.evaluation.mmeb_v2.reading import Gathered, Source, picture, text_of
from tte_jax.evaluation.mmeb_v2.registry import IN_ROWS, Layout
from tte_jax.evaluation.task import EvalTask, Query

COLUMNS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")
PLACEHOLDER = "<|image_1|>"


def read(source: Source) -> EvalTask:
    """Raises MissingDataError, DataLossError."""
    made = Gathered()
    (config,) = source.info.configs
    rows = read_rows(source.info, source.root, config=config, columns=COLUMNS)
    for number, row in enumerate(source.first(rows)):
        pool = _candidates(row, source, made)
        text, instruction = row["qry_text"] or "", _instruction(row["qry_inst"])
        if source.query_instruction != IN_ROWS:
            instruction = source.query_instruction
        if source.info.layout is Layout.TEXT_TO_IMAGE:
            load = text_of(text.replace(PLACEHOLDER, "").strip())
        else:
            load = picture(made.need(source.media / row["qry_img_path"]), text)
        # A list may name one candidate twice; it is ranked once.
        unique = tuple(dict.fromkeys(pool))
        made.queries.append(
            Query(str(number), load, (pool[0],), pool=unique, instruction=instruction)
        )
    return made.task(source)


def _candidates(row: dict[str, Any], source: Source, made: Gathered) -> list[str]:
    texts, paths = row["tgt_text"] or [], row["tgt_img_path"] or []
    if source.info.layout is Layout.IMAGE_TO_TEXT:
        for text in texts:
            made.add(text, text_of(text))
        return list(texts)
    instruction = _instruction(row["tgt_inst"])
    if source.target_instruction != IN_ROWS:
        instruction = source.target_instruction
    # Captions are shown where the first is one, and otherwise only tell candidates apart.
    shown = bool(texts and texts[0].strip())
    texts = list(texts) or [""] * len(paths)
    names: list[str] = []
    for path, text in zip(paths, texts, strict=True):
        across = source.info.layout is Layout.IMAGE_TO_IMAGE
        name = path + ":" + text.strip('"') if across else path
        if name not in made.items:
            file = made.need(source.media / path)
            made.add(name, picture(file, text if shown else ""), instruction)
        names.append(name)
    return names


def _instruction(text: str | None) -> str:
    return (text or "").replace(PLACEHOLDER, "").strip()
