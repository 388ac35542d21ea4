"""The engine serves every multimodal family, and gives what `load_model` gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tte_jax
from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.engine.jobs import NEVER
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.template import Prompt
from tte_jax.reasoner import Reasoner
from tte_jax.stages import EmbedItem, ReasonItem

NEW_TOKENS = 12
CONTENTS = [
    Content.of("", tiny_models.png(1)),
    Content.of("a cat"),
    Content.of("", tiny_models.png(2, 56, 28)),
]
# Few shapes: each is a compilation, and what buckets do is tested with the first family.
BUCKETS = {
    "images": [[4, 16]],
    "prefill": [[4, 64]],
    "embed": [[4, 64]],
    "decode": [[4, 88]],
    "new_tokens": 24,
    "decode_steps": 4,
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def directory(request: pytest.FixtureRequest) -> Path:
    return tiny_models.write_model(
        tiny_models.root() / f"families-{request.param}",  # with the tests' compile cache
        family=request.param,
        roles=["embedder", "reasoner"],
        buckets=BUCKETS,
    )


def arrays(prompt: Prompt) -> dict[str, Any]:
    """One prompt as `load_model` takes it."""
    images = prompt.images
    return {
        "input_ids": np.asarray(prompt.ids)[None],
        "pixel_values": np.concatenate([p for p, _ in images]) if images else None,
        "image_grid_thw": np.array([grid for _, grid in images]) if images else None,
    }


def test_embedder_is_load_model(directory: Path) -> None:
    items = [EmbedItem(c, Side.QUERY) for c in CONTENTS]
    with Embedder.from_pretrained(directory) as embedder:
        vectors = embedder.embed(items)
    model, prompts = tte_jax.load_model(directory), PromptSet.from_dir(directory)
    for item, vector in zip(items, vectors, strict=True):
        last = model(**arrays(prompts.embed(item))).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, last / np.linalg.norm(last), rtol=0, atol=2e-5)
    assert (vectors @ vectors.T - np.eye(3)).max() < 0.9999


def test_reasoner_is_load_model(directory: Path) -> None:
    """Greedy tokens of the slots are those of `generate`, which the reference agrees with."""
    items = [ReasonItem(c, Side.DOCUMENT if c.media else Side.QUERY) for c in CONTENTS]
    with Reasoner.from_pretrained(directory) as reasoner:
        reasoner.warmup()
        jobs = [reasoner.prepare(item, NEW_TOKENS) for item in items]
        assert all(jobs)
        # Without the forced end of the thinking, which is no choice of the model.
        free = [replace(job, close_at=NEVER) for job in jobs if job]
        made = [future.result(300).tokens for future in reasoner.loop.submit(free, wait=True)]
        whole = reasoner.reason(items, 20)
        reasonings, embeddings, _ = reasoner.reason_and_embed(items, NEW_TOKENS)
        assert reasoner.compile_count == reasoner.warm_compile_count
        stops = list(reasoner.served.prompts.stop_ids)
    assert all(0 < r.tokens <= 20 for r in whole)
    model, prompts = tte_jax.load_model(directory), PromptSet.from_dir(directory)
    for item, tokens in zip(items, made, strict=True):
        given = arrays(prompts.reason(item))
        out = model.generate(**given, max_new_tokens=NEW_TOKENS, eos_token_id=stops)
        assert tokens == out[0, given["input_ids"].shape[1] :].tolist()
    assert len({tuple(tokens) for tokens in made}) == len(made)
    for item, reasoning, embedding in zip(items, reasonings, embeddings, strict=True):
        prompt = prompts.embed(EmbedItem(item.content, item.side, reasoning.text))
        last = model(**arrays(prompt)).last_hidden_state[0, -1]
        assert embedding is not None
        np.testing.assert_allclose(embedding.vector, last / np.linalg.norm(last), rtol=0, atol=2e-5)


def test_legacy_positions_reach_the_model(tmp_path: Path) -> None:
    """`mrope_mode` of `tte.json`: pads without vision start are text to the older positions."""
    path = tiny_models.write_model(
        tmp_path / "m", family="qwen2_5_vl", roles=["embedder"], buckets=BUCKETS
    )
    spec = json.loads((path / "tte.json").read_text()) | {"prompts": "vlm2vec"}
    item = EmbedItem(CONTENTS[0], Side.QUERY)
    vectors = {}
    for mode in ("legacy", "current"):
        (path / "tte.json").write_text(json.dumps({**spec, "mrope_mode": mode}))
        with Embedder.from_pretrained(path) as embedder:
            vectors[mode] = embedder.embed([item])[0]
        model = tte_jax.load_model(path, mrope_mode=mode)
        last = model(**arrays(PromptSet.from_dir(path).embed(item))).last_hidden_state[0, -1]
        np.testing.assert_allclose(vectors[mode], last / np.linalg.norm(last), rtol=0, atol=2e-5)
    assert float(vectors["legacy"] @ vectors["current"]) < 0.9999
