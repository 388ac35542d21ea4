"""After warm-up nothing is compiled, whatever is asked."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from tests.system.running import COLOURS, THINGS, System, picture
from tte_jax.cascade import SearchQuery, SearchStage
from tte_jax.client import Client
from tte_jax.content import Budget, Content
from tte_jax.filters import AllOf, AnyOf, Equals, Filter, Not, OneOf, Range

QUERIES = 200
MODEL_SERVICES = ("reasoner", "embedder", "reranker")


def random_filter(rng: random.Random) -> Filter | None:
    low = rng.randint(0, 20)
    return rng.choice(
        [
            None,
            Equals("kept", rng.random() < 0.5),
            OneOf("colour", tuple(rng.sample(COLOURS, 2))),
            Range("size", low, low + rng.randint(1, 15)),
            AllOf((Equals("colour", rng.choice(COLOURS)), Not(Range("size", low)))),
            AnyOf((Equals("size", low), Equals("nothing has", "this"))),
        ]
    )


def random_query(rng: random.Random) -> SearchQuery:
    words = [rng.choice([*COLOURS, *THINGS]) for _ in range(rng.randint(1, 6))]
    text = " ".join(words) if rng.random() < 0.7 else ""
    images = (picture(rng),) if not text or rng.random() < 0.5 else ()
    return SearchQuery(
        Content.of(text, *images),
        top_k=rng.randint(1, 40),
        filter=random_filter(rng),
        budget=Budget(
            reasoning_tokens=rng.choice([0, 1, 5, 8]),
            candidates=rng.randint(1, 50),
            rewrite_depth=rng.choice([0, 0, 0, 1, 3]),
            rewrite_tokens=rng.randint(1, 8),
            rerank_depth=rng.choice([0, 1, 5, 10]),
        ),
        deadline_s=120.0,
    )


def compiled(system: System) -> dict[str, tuple[int, float]]:
    """By service: compilations as `Info` and as `/metrics` tell them."""
    seen = system.look()
    counts = {}
    for name in MODEL_SERVICES:
        about = seen[name].about
        assert about["compile_count"] > 0
        metrics = system.metrics(name)
        assert metrics["tte_warm_compile_count"] == about["warm_compile_count"]
        counts[name] = (about["compile_count"], metrics["tte_compile_count"])
    return counts


def test_random_queries_compile_nothing(system: System, client: Client) -> None:
    rng = random.Random(7)
    queries = [random_query(rng) for _ in range(QUERIES)]
    before, seen = compiled(system), system.look()
    for name in MODEL_SERVICES:
        # The ingest, too, found everything compiled.
        assert before[name] == (seen[name].about["warm_compile_count"],) * 2

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(client.search_final, queries))

    assert compiled(system) == before
    for asked, answer in zip(queries, answers, strict=True):
        assert answer.final and len(answer.results) <= asked.top_k
        if asked.filter is not None:
            assert all(asked.filter.matches(found.metadata) for found in answer.results)
    # The queries really reached every stage, and in numbers.
    stages = [usage.stage for answer in answers for usage in answer.usage]
    for stage in ("reason", "embed", "index", "rewrite", "rerank"):
        assert stages.count(stage) >= 20, stage
    assert sum(a.stage is SearchStage.RERANKED for a in answers) >= QUERIES // 3
    assert sum(u.tokens_out for a in answers for u in a.usage if u.stage == "reason") >= QUERIES
