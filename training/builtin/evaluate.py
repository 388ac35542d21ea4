"""Held-out figures of the built-in models, through the same role objects that serve them.

    python -m training.builtin.evaluate --out benchmarks/results/builtin_quality.json

Three kinds of query against pools of pictures; four arms: chance, no reasoning, with ECR on both
sides, and ECR followed by the text-only rerank of the first ten (ECRR). What training never saw:
the whole fluent-emoji-flat style, about 200 concepts in every style, and whole combinations of
family, gender and skin tone. Hits count the one right picture, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import io
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image

from training.builtin import SERVED_STYLE, texts
from training.data.concepts import Concept
from training.data.emoji import EmojiData, load
from tte_jax.builtin.models import EMBEDDER, REASONER, RERANKER, WEIGHTS_DIR
from tte_jax.cascade.texts import rerank_text
from tte_jax.content import NO_REASONING, Content, Reasoning, Side
from tte_jax.embedder import Embedder
from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.ecr import parse_ecr
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker
from tte_jax.stages import EmbedItem, ReasonItem

UNSEEN_STYLE = "fluent-emoji-flat"
FOUR_STYLES = ("noto", "twemoji", "openmoji", UNSEEN_STYLE)


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      data: folder built by `training.data.emoji`.
      models: folder with the model directories.
      budget: reasoning tokens, queries and documents alike.
      depth: how many first-stage candidates are reranked.
      composed: how many composed queries of each kind.
      limit: use only so many queries of the other kinds; 0 = all.
      skip: leave out so many of the other kinds first.
      pool: so many documents in each pool, all right ones among them; 0 = the whole style.
      rerank: off while there is no reranker yet.
      ranks: a file for the rank of each query's right document, which `training.builtin.compare`
        reads; None = none is written.
    """

    data: Path = Path(".data/emoji")
    models: Path = WEIGHTS_DIR
    out: Path = Path("benchmarks/results/builtin_quality.json")
    budget: int = 64
    depth: int = 10
    composed: int = 500
    limit: int = 0
    skip: int = 0
    pool: int = 0
    rerank: bool = True
    ranks: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Query:
    """Content with the key of its one right document, and marks to group results by."""

    content: Content
    answer: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Queries against the drawings of one style."""

    name: str
    queries: list[Query]
    style: str


@dataclass
class Pool:
    """Documents of one style: keys, and what the models make of them."""

    keys: list[str]
    contents: list[Content]
    reasonings: list[Reasoning] = field(default_factory=list)
    plain: np.ndarray | None = None
    with_ecr: np.ndarray | None = None


@dataclass(frozen=True)
class Roles:
    reasoner: Reasoner
    embedder: Embedder
    reranker: Reranker | None


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8 → PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


class Pictures:
    """Original drawings by (style, concept key), encoded."""

    def __init__(self, data: EmojiData) -> None:
        self._data = data
        originals = np.flatnonzero(data.variants == 0)
        self._rows = {
            (data.styles[data.style_ids[r]], data.concepts[data.concept_ids[r]].key): int(r)
            for r in originals
        }

    def has(self, style: str, key: str) -> bool:
        return (style, key) in self._rows

    def of(self, style: str, key: str) -> bytes:
        return png(self._data.images[self._rows[style, key]])

    def keys(self, style: str) -> list[str]:
        return sorted(k for s, k in self._rows if s == style)


def reason_all(roles: Roles, contents: Sequence[Content], side: Side, budget: int):
    """ECRs in order; the engine batches by itself."""
    items = [ReasonItem(c, side) for c in contents]
    return roles.reasoner.reason(items, max_tokens=budget)


def embed_all(
    roles: Roles, contents: Sequence[Content], side: Side, ecrs: Sequence[Reasoning]
) -> np.ndarray:
    items = [EmbedItem(c, side, r.text) for c, r in zip(contents, ecrs, strict=True)]
    return roles.embedder.embed(items)


def build_pool(roles: Roles, pictures: Pictures, style: str, keys: list[str], budget: int) -> Pool:
    contents = [Content.of("", pictures.of(style, k)) for k in keys]
    pool = Pool(keys, contents)
    pool.reasonings = reason_all(roles, contents, Side.DOCUMENT, budget)
    nothing = [NO_REASONING] * len(keys)
    pool.plain = embed_all(roles, contents, Side.DOCUMENT, nothing)
    pool.with_ecr = embed_all(roles, contents, Side.DOCUMENT, pool.reasonings)
    return pool


def ranks(order: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[Q] 0-based rank of the right document in each row of `order` [Q, K]; K if absent."""
    hit = order == right[:, None]
    return np.where(hit.any(1), hit.argmax(1), order.shape[1])


def summary(rank: np.ndarray, rng: np.random.Generator) -> dict[str, float | list[float]]:
    out: dict[str, float | list[float]] = {}
    for k in (1, 10):
        hits = (rank < k).astype(float)
        draws = rng.choice(hits, (1000, len(hits))).mean(1)
        out[f"hit@{k}"] = round(float(hits.mean()), 4)
        out[f"hit@{k}_ci95"] = [round(float(q), 4) for q in np.quantile(draws, [0.025, 0.975])]
    return out


def score_readable(reranker: Reranker, query: str, candidates: list[str]) -> np.ndarray:
    """Scores as the cascade uses them: what is too long for the model stays below the others."""
    try:
        return reranker.score(query, candidates)
    except InvalidInputError:
        if len(candidates) == 1:
            return np.array([-1.0], np.float32)
        return np.concatenate([score_readable(reranker, query, [c]) for c in candidates])


@dataclass(frozen=True)
class Found:
    """What one task came to.

    Attributes:
      ranks: for each arm, 0-based rank [Q] of each query's right document; 50 = not among the
        first 50.
      named: [Q] bool, whether a query's reasoning names the right concept, to the letter.
      about: what it cost.
    """

    ranks: dict[str, np.ndarray]
    named: np.ndarray
    about: dict[str, float]


def rank_queries(
    roles: Roles, queries: list[Query], pool: Pool, labels: dict[str, str], config: Config
) -> Found:
    """All arms of one task; `labels` of the concepts by key."""
    assert pool.plain is not None and pool.with_ecr is not None
    contents = [q.content for q in queries]
    right = np.array([pool.keys.index(q.answer) for q in queries])
    nothing = [NO_REASONING] * len(queries)
    started = time.time()
    ecrs = reason_all(roles, contents, Side.QUERY, config.budget)
    arms: dict[str, np.ndarray] = {}
    plain = embed_all(roles, contents, Side.QUERY, nothing)
    arms["none"] = np.argsort(-(plain @ pool.plain.T), axis=1, kind="stable")[:, :50]
    vectors = embed_all(roles, contents, Side.QUERY, ecrs)
    arms["ecr"] = np.argsort(-(vectors @ pool.with_ecr.T), axis=1, kind="stable")[:, :50]
    if roles.reranker is not None:
        reranked = arms["ecr"].copy()
        for row, (query, ecr) in enumerate(zip(queries, ecrs, strict=True)):
            head = reranked[row, : config.depth]
            candidates = [rerank_text(pool.reasonings[i]) for i in head]
            scores = score_readable(roles.reranker, rerank_text(ecr, query.content), candidates)
            reranked[row, : config.depth] = head[np.argsort(-scores, kind="stable")]
        arms["ecr+ecrr"] = reranked
    named = np.array(
        [parse_ecr(e.text).answer == labels[q.answer] for e, q in zip(ecrs, queries, strict=True)]
    )
    about = {
        "queries": len(queries),
        "pool": len(pool.keys),
        "named_by_reasoning": round(float(named.mean()), 4),
        "query_reasoning_tokens": round(float(np.mean([r.tokens for r in ecrs])), 1),
        "seconds": round(time.time() - started, 1),
    }
    return Found({arm: ranks(order, right) for arm, order in arms.items()}, named, about)


def figures(
    found: dict[str, np.ndarray], queries: list[Query], pool: int, seed: int
) -> dict[str, dict[str, object]]:
    """Hits of all arms of one task, overall and by mark."""
    rng = np.random.default_rng(seed)
    result: dict[str, dict[str, object]] = {
        "chance": {"hit@1": round(1 / pool, 5), "hit@10": round(10 / pool, 5)}
    }
    marks = sorted({m for q in queries for m in q.marks})
    for arm, rank in found.items():
        result[arm] = dict(summary(rank, rng))
        result[arm]["by"] = {
            m: {**summary(rank[here], rng), "queries": int(here.sum())}
            for m in marks
            if (here := np.array([m in q.marks for q in queries])).any()
        }
    return result


def composed_queries(
    data: EmojiData,
    pictures: Pictures,
    style: str,
    targets: Callable[[Concept], bool],
    count: int,
    rng: np.random.Generator,
) -> list[Query]:
    """Pictures of one variant in `style` with the change to another; the answer is in OpenMoji."""
    concepts = [
        c for c in data.concepts if not c.multi_person and (c.gender != "none" or c.skin != "none")
    ]
    families: dict[str, list[Concept]] = {}
    for c in concepts:
        families.setdefault(c.family, []).append(c)
    pairs = [
        (source, target)
        for members in families.values()
        for target in members
        if targets(target) and pictures.has(SERVED_STYLE, target.key)
        for source in members
        if texts.changed(source, target) and pictures.has(style, source.key)
    ]
    chosen = rng.permutation(len(pairs))[:count]
    queries = []
    for i in chosen:
        source, target = pairs[i]
        change = texts.change_query(source, target, rng)
        queries.append(Query(Content.of(change, pictures.of(style, source.key)), target.key))
    return queries


def tasks_of(data: EmojiData, pictures: Pictures, config: Config) -> list[Task]:
    """The queries; the same for the same options."""
    rng = np.random.default_rng(config.seed)
    by_key = {c.key: c for c in data.concepts}
    rows = np.flatnonzero(data.heldout_concept)
    unseen = {data.concepts[i].key for i in data.concept_ids[rows]}
    rows = np.flatnonzero(data.heldout_combination)
    combination = {data.concepts[i].key for i in data.concept_ids[rows]}
    asked = plain_keys(data, pictures)[config.skip :]
    asked = asked[: config.limit] if config.limit else asked
    if not asked:
        raise InvalidInputError(
            f"skip {config.skip} leaves no query of {len(plain_keys(data, pictures))}", field="skip"
        )

    def marks(key: str) -> tuple[str, ...]:
        return ("unseen concept",) if key in unseen else ("seen concept",)

    def tags(concept: Concept) -> str:
        return ", ".join(t.lower() for t in concept.tags) or texts.label(concept)

    def composed(style: str, targets: Callable[[Concept], bool]) -> list[Query]:
        return composed_queries(data, pictures, style, targets, config.composed, rng)

    def held_out(concept: Concept) -> bool:
        return concept.key in combination

    def trained(concept: Concept) -> bool:
        return concept.key not in combination and concept.key not in unseen

    return [
        Task(
            "text → image, by label; unseen style",
            [Query(Content.of(texts.label(by_key[k])), k, marks(k)) for k in asked],
            UNSEEN_STYLE,
        ),
        Task(
            "text → image, by tags; unseen style",
            [Query(Content.of(tags(by_key[k])), k, marks(k)) for k in asked],
            UNSEEN_STYLE,
        ),
        Task(
            "image → image; from the unseen style into OpenMoji",
            [Query(Content.of("", pictures.of(UNSEEN_STYLE, k)), k, marks(k)) for k in asked],
            SERVED_STYLE,
        ),
        Task(
            "composed; held-out combinations, from a trained style (noto)",
            composed("noto", held_out),
            SERVED_STYLE,
        ),
        Task(
            "composed; held-out combinations, from the unseen style",
            composed(UNSEEN_STYLE, held_out),
            SERVED_STYLE,
        ),
        Task(
            "composed; trained combinations, from the unseen style",
            composed(UNSEEN_STYLE, trained),
            SERVED_STYLE,
        ),
    ]


def plain_keys(data: EmojiData, pictures: Pictures) -> list[str]:
    """Concepts without skin tones that four styles draw, in order."""
    by_key = {c.key: c for c in data.concepts}
    return [
        k
        for k in pictures.keys(UNSEEN_STYLE)
        if by_key[k].skin == "none"
        and not by_key[k].tones
        and all(pictures.has(s, k) for s in FOUR_STYLES)
    ]


def pool_keys(
    data: EmojiData, pictures: Pictures, tasks: Sequence[Task], style: str, config: Config
) -> list[str]:
    """The documents of a style: all of them, or the right ones with others drawn to them."""
    keys = plain_keys(data, pictures) if style == UNSEEN_STYLE else pictures.keys(style)
    if not config.pool:
        return keys
    right = {q.answer for task in tasks if task.style == style for q in task.queries}
    others = [k for k in keys if k not in right]
    drawn = np.random.default_rng(config.seed).permutation(len(others))
    return sorted(right | {others[i] for i in drawn[: max(config.pool - len(right), 0)]})


def main(config: Config) -> None:
    data = load(config.data)
    pictures = Pictures(data)
    roles = Roles(
        Reasoner.from_pretrained(config.models / REASONER),
        Embedder.from_pretrained(config.models / EMBEDDER),
        Reranker.from_pretrained(config.models / RERANKER) if config.rerank else None,
    )
    tasks = tasks_of(data, pictures, config)
    labels = {c.key: texts.label(c) for c in data.concepts}
    started = time.time()
    pools = {
        style: build_pool(
            roles, pictures, style, pool_keys(data, pictures, tasks, style, config), config.budget
        )
        for style in dict.fromkeys(task.style for task in tasks)
    }
    indexing = time.time() - started
    report: dict[str, object] = {
        "command": shlex.join(["python", "-m", "training.builtin.evaluate", *sys.argv[1:]]),
        "models": {
            "reasoner": roles.reasoner.version,
            "embedder": roles.embedder.version,
            "reranker": roles.reranker.version if roles.reranker else None,
        },
        "budget": config.budget,
        "rerank_depth": config.depth,
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}, jax {jax.__version__}",
        "indexing_seconds": round(indexing, 1),
        "tasks": {},
    }
    every: dict[str, object] = {}
    for task in tasks:
        pool = pools[task.style]
        found = rank_queries(roles, task.queries, pool, labels, config)
        result = figures(found.ranks, task.queries, len(pool.keys), config.seed)
        result["about"] = dict(found.about)
        report["tasks"][task.name] = result  # type: ignore[index]
        every[task.name] = {
            "answers": [q.answer for q in task.queries],
            "pool": len(pool.keys),
            "named": found.named.tolist(),
            "ranks": {arm: rank.tolist() for arm, rank in found.ranks.items()},
        }
        hits = {arm: (v["hit@1"], v["hit@10"]) for arm, v in result.items() if arm != "about"}
        print(f"{task.name}\n  {hits}  {found.about}", flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if config.ranks is not None:
        config.ranks.parent.mkdir(parents=True, exist_ok=True)
        kept = {"models": report["models"], "tasks": every}
        config.ranks.write_text(json.dumps(kept, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
