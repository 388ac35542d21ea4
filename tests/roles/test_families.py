"""The engine serves every multimodal family, and gives what `load_model` gives."""

from __future__ import annotations

import numpy as np
import pytest

import tte_jax
from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.stages import EmbedItem


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_embedder_is_load_model(tmp_path, family: str) -> None:
    path = tiny_models.write_model(tmp_path / family, family=family, roles=["embedder"])
    items = [
        EmbedItem(Content.of("", tiny_models.png(1)), Side.DOCUMENT, ""),
        EmbedItem(Content.of("a cat"), Side.QUERY, ""),
        EmbedItem(Content.of("", tiny_models.png(2, 56, 28)), Side.DOCUMENT, ""),
    ]
    embedder = Embedder.from_pretrained(path)
    try:
        vectors = embedder.embed(items)
    finally:
        embedder.close()
    model, prompts = tte_jax.load_model(path), PromptSet.from_dir(path)
    for item, vector in zip(items, vectors, strict=True):
        prompt = prompts.embed(item)
        images = prompt.images
        out = model(
            np.asarray(prompt.ids)[None],
            pixel_values=np.concatenate([p for p, _ in images]) if images else None,
            image_grid_thw=np.array([grid for _, grid in images]) if images else None,
        )
        last = out.last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, last / np.linalg.norm(last), rtol=0, atol=2e-5)
    assert (vectors @ vectors.T - np.eye(3)).max() < 0.9999
