"""Training rows for the reranker: what the retriever really finds, as the reasoner really words it.

    python -m training.builtin.rerank_rows --out .data/runs/rerank/rows.jsonl

The reasoner describes training pictures, the embedder ranks them, and the first candidates become
one row: ranked, with the right ones marked. Documents are as they are served; queries are spoilt a
little (small, grey, turned, cut, noisy), so that the reasoner errs about them as it does about art
that it never saw. Where documents were spoilt too, a candidate in just the query's words was wrong
so often that the reranker did not learn to look for it. Only training concepts are used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from training.builtin import texts
from training.builtin.evaluate import Roles, embed_all, png, reason_all
from training.builtin.images import spoil
from training.builtin.sampling import image_table, pick_row
from training.data.emoji import EmojiData, load
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.cascade.texts import rerank_text
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.reasoner import Reasoner


@dataclass(frozen=True)
class Config:
    """Options: the unified model directory, numbers of queries by kind, candidates a row, and how
    badly the queries' and the documents' pictures are spoilt, in [0, 1]."""

    data: Path = Path(".data/emoji")
    model: Path = WEIGHTS_DIR / REASONER
    out: Path = Path(".data/runs/rerank/rows.jsonl")
    text: int = 1200
    image: int = 800
    composed: int = 1400
    documents: int = 3300
    candidates: int = 12
    spoilt_queries: float = 0.3
    spoilt_documents: float = 0.0
    budget: int = 64
    seed: int = 0


def documents(data: EmojiData, count: int, rng: np.random.Generator) -> list[int]:
    """Rows of training originals, OpenMoji first, since that is what is served."""
    rows = data.rows("train", originals=True)
    style = np.array([data.styles[s] for s in data.style_ids[rows]])
    served, others = rows[style == "openmoji"], rows[style != "openmoji"]
    both = np.concatenate([rng.permutation(served), rng.permutation(others)])
    return [int(r) for r in both[:count]]


def main(config: Config) -> None:
    data = load(config.data)
    rng = np.random.default_rng(config.seed)
    roles = Roles(
        Reasoner.from_pretrained(config.model), Embedder.from_pretrained(config.model), None
    )
    table = image_table(data)

    def picture(row: int, most: float = config.spoilt_queries) -> Content:
        spoilt = spoil(data.images[row], rng, float(rng.uniform(0.0, most)))
        return Content.of("", png(spoilt))

    rows = documents(data, config.documents, rng)
    pool = [picture(r, config.spoilt_documents) for r in rows]
    keys = np.array([data.concept_ids[r] for r in rows])
    pool_ecrs = reason_all(roles, pool, Side.DOCUMENT, config.budget)
    pool_vectors = embed_all(roles, pool, Side.DOCUMENT, pool_ecrs)

    here = [i for i, c in enumerate(table.concepts) if c in set(keys)]
    weights = table.weights[here] / table.weights[here].sum()
    queries: list[Content] = []
    answers: list[int] = []
    for index in rng.choice(here, config.text, p=weights):
        concept = data.concepts[table.concepts[index]]
        queries.append(Content.of(texts.text_query(concept, rng)))
        answers.append(int(table.concepts[index]))
    for index in rng.choice(here, config.image, p=weights):
        queries.append(picture(pick_row(table, int(index), rng)))
        answers.append(int(table.concepts[index]))
    members: dict[str, list[int]] = {}
    for index in here:
        concept = data.concepts[table.concepts[index]]
        if not concept.multi_person and (concept.gender != "none" or concept.skin != "none"):
            members.setdefault(concept.family, []).append(index)
    families = [m for m in members.values() if len(m) >= 4]
    while len(queries) < config.text + config.image + config.composed:
        source, target = rng.choice(families[rng.integers(len(families))], 2, replace=False)
        a, b = (data.concepts[table.concepts[i]] for i in (source, target))
        if texts.changed(a, b):
            content = picture(pick_row(table, int(source), rng))
            queries.append(Content.of(texts.change_query(a, b, rng), content.media[0].data))
            answers.append(int(table.concepts[target]))

    ecrs = reason_all(roles, queries, Side.QUERY, config.budget)
    vectors = embed_all(roles, queries, Side.QUERY, ecrs)
    order = np.argsort(-(vectors @ pool_vectors.T), axis=1, kind="stable")
    found, lines = 0, []
    for content, ecr, answer, ranked in zip(queries, ecrs, answers, order, strict=True):
        head = list(ranked[: config.candidates])
        right = np.flatnonzero(keys == answer)
        found += bool(set(head) & set(right))
        if not set(head) & set(right):
            head[-1] = int(right[0])
        row = {
            "query": rerank_text(ecr, content),
            "candidates": [rerank_text(pool_ecrs[i]) for i in head],
            "labels": [int(keys[i] == answer) for i in head],
        }
        if row["query"] and all(row["candidates"]):
            lines.append(json.dumps(row, ensure_ascii=False))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = config.out.with_suffix(".partial")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, config.out)
    print(
        f"{len(lines)} rows in {config.out}; the right document is among the first "
        f"{config.candidates} in {found / len(queries):.1%}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
