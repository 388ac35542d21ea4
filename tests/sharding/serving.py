"""The three roles on meshes, in a child process: `python -m tests.sharding.serving ORDER.json`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from tests import compile_cache
from tests.tiny_models import png
from tte_jax import sharding
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.engine.buckets import Buckets
from tte_jax.engine.executables import enable_compile_cache
from tte_jax.reasoner import Reasoner, Sampling
from tte_jax.reranker import Reranker
from tte_jax.stages import EmbedItem, ReasonItem

CONTENTS = [
    Content.of("a smiling cat"),
    Content.of("What is this?", png(1)),
    Content.of("Find:", png(2, 28, 56)),
    Content.of("a face with a dark skin tone"),
    Content.of("Change:", png(3, 56, 28)),
]
CANDIDATES = ["a smiling cat", "no", "the thing that is wanted", "yes yes", "a face", "dark"]
LONG = Content.of(
    "yes no yes no a cat the thing that is wanted with a dark skin tone a smiling cat face", png(1)
)
NEW_TOKENS = 20
PATIENCE_S = 300.0
# Few, since each compiles anew on every mesh: a row count that meshes split and one they do not.
BUCKETS = Buckets(
    images=((4, 16),),
    prefill=((4, 64), (1, 64)),
    append=((2, 24, 40),),
    embed=((4, 64), (1, 64)),
    prefix=(48,),
    score=((4, 32), (1, 32)),
    decode=((4, 88),),
    new_tokens=24,
    decode_steps=4,
)


def answers(order: dict[str, Any], mesh: Any = None) -> dict[str, Any]:
    """What the roles say, and how many programs were compiled after their warm-up.

    Order: {"vl", "text": model directories, "quantise": as `open_model` takes it}.
    """
    options = {"mesh": mesh, "quantise": order.get("quantise"), "buckets": BUCKETS}
    told: dict[str, Any] = {}
    with Embedder.from_pretrained(order["vl"], **options) as embedder:
        embedder.warmup()
        items = [EmbedItem(c, Side.QUERY, "") for c in CONTENTS]
        told["embeddings"] = embedder.embed(items).tolist()
        one = embedder.embed(items[:1])  # another bucket
        told["embeddings"] += one.tolist()
        told["embedder_compiles"] = embedder.compile_count - embedder.warm_compile_count
    with Reasoner.from_pretrained(order["vl"], **options) as reasoner:
        reasoner.warmup()
        items = [ReasonItem(c, Side.QUERY) for c in CONTENTS]
        greedy = reasoner.reason(items, NEW_TOKENS)
        drawn = reasoner.reason(items, NEW_TOKENS, sampling=Sampling(0.7, 0.9, 3))
        told["greedy"] = [r.text for r in greedy]
        told["drawn"] = [r.text for r in drawn]
        told["behind_prefix"], told["reused"] = behind_prefix(reasoner)
        # In all slots together, and in one alone.
        for some in (items, items[:1]):
            _, embeddings, _ = reasoner.reason_and_embed(some, 12)
            told.setdefault("slots", []).extend(e.vector.tolist() for e in embeddings if e)
        told["reasoner_compiles"] = reasoner.compile_count - reasoner.warm_compile_count
        state: Any = reasoner.loop._state
        told["cache"] = spec(state.k)
    with Reranker.from_pretrained(order["text"], **options) as reranker:
        reranker.warmup()
        told["scores"] = reranker.score("a cat", CANDIDATES).tolist()
        told["scores"] += reranker.score("the thing", CANDIDATES[:1], "Find:").tolist()
        told["reranker_compiles"] = reranker.compile_count - reranker.warm_compile_count
        (prefix, *_) = reranker.prefix_cache._values.values()
        told["prefix"] = spec(prefix.k)
        told["matrix"] = spec(jax.tree.leaves(reranker.served.model.text.layers.q_dnh)[0])
    return told


def behind_prefix(reasoner: Reasoner) -> tuple[list[list[int]], list[int]]:
    """New tokens of a prompt with a marked beginning, read first and reused then; tokens saved."""
    job = reasoner.prepare(ReasonItem(LONG, Side.QUERY), NEW_TOKENS)
    assert job is not None and job.input.tokens > 36
    job = replace(job, input=replace(job.input, prefix_ends=(36,)))
    made = [reasoner.loop.submit([job])[0].result(PATIENCE_S) for _ in range(2)]
    return [m.tokens for m in made], [m.cached_tokens for m in made]


def spec(x: Any) -> str:
    """How an array is split, as text."""
    return str(getattr(x.sharding, "spec", None))


def main(order: dict[str, Any]) -> None:
    """Order: also {"meshes", "out" (folder)}. Writes `answers` of mesh 0, 1, … to `{mesh}.json`."""
    enable_compile_cache(compile_cache.directory())
    for number, sizes in enumerate(order["meshes"]):
        told = answers(order, sharding.make_mesh(**sizes))
        (Path(order["out"]) / f"{number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
