"""What the unified trainer computes is what the roles serve."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.training.drawings import emoji_data
from training import builtin, export
from training.pairs import FEATURES, Batch, Mix, PairSource, lookalikes
from training.sampling import image_table
from training.unified import contrast, run, see
from tte_jax.builtin.models import REASONER, path_of
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.stages import EmbedItem
from tte_jax.weights import hf

MIX = Mix(text=4, image=2, composed=4, corrupt=0.5, corrupt_text=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(path_of(REASONER))


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer) -> PairSource:
    data = emoji_data()
    count = len(image_table(data).concepts)
    prototypes = np.random.default_rng(0).standard_normal((count, 8))
    return PairSource(data, tokenizer, builtin.IMAGES, prototypes=prototypes, seed=3)


@pytest.fixture(scope="module")
def batch(source: PairSource) -> Batch:
    return next(source.batches(7, MIX))


def test_a_batch_depends_on_seed_and_step_alone(source: PairSource, batch: Batch) -> None:
    batches = source.batches(6, MIX)
    next(batches)
    for again, first in zip(jax.tree.leaves(next(batches)), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(again, first)


def test_documents_answer_their_queries(batch: Batch) -> None:
    assert batch.answers.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert len(batch.pictures) == 8 + 2 + 4
    # Documents show their concept; image queries show the concept of the document they ask for.
    np.testing.assert_array_equal(batch.picture_concepts[:8], batch.concepts)
    np.testing.assert_array_equal(batch.picture_concepts[8:10], batch.concepts[:2])
    # A composed query shows another variant of the family that its document is of.
    concepts = emoji_data().concepts
    for shown, wanted in zip(batch.picture_concepts[10:], batch.concepts[4:], strict=True):
        assert shown != wanted
        assert concepts[shown].family == concepts[wanted].family


def test_wrong_reasonings_are_shown_but_not_learnt(
    source: PairSource, batch: Batch, tokenizer: Tokenizer
) -> None:
    concepts = emoji_data().concepts
    group = batch.seen
    learnt = group.weights.any(1)
    assert learnt.any() and not learnt.all()
    for row, concept in enumerate(batch.concepts):
        n = group.prompt[row]
        shown = tokenizer.decode(group.ids[row, n : group.end[row]].tolist())
        truth = source.reasonings.of(concepts[concept])
        assert (shown == truth) == bool(learnt[row])
        told = group.targets[row, : int(group.weights[row].sum())].tolist()
        assert not learnt[row] or tokenizer.decode(told) == truth


def test_lookalikes_are_the_nearest_of_other_families() -> None:
    angles = np.linspace(0, np.pi, 12)
    prototypes = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = lookalikes(prototypes - prototypes.mean(0), np.arange(12) // 2)
    assert found.shape == (12, 8)
    assert found[0, 0] == 2 and found[11, 0] == 9  # neighbours 1 and 10 are of the same family
    assert all(i // 2 not in found[i] // 2 for i in range(12))


def test_both_endings_equal_what_the_embedder_serves(
    batch: Batch, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = MultimodalLM(builtin.unified_config(tokenizer), rngs=nnx.Rngs(0))
    for leaf in ("q_dnh", "k_dkh", "o_nhd", "down_fd"):  # louder, or every input looks alike
        param = getattr(model.text.layers, leaf)
        param[...] = param[...] * 8
    hf.export(model, tmp_path / "weights", dtype=jnp.bfloat16)
    export.write(
        tmp_path / "model",
        model.config,
        tmp_path / "weights",
        path_of(REASONER),
        {"format": 1, "prompts": "mini", "name": "t", "version": "1", "role": ["embedder"]},
    )
    model = hf.load(tmp_path / "model")
    pictures = np.random.default_rng(0).integers(
        0, 256, (len(batch.pictures), builtin.SIDE, builtin.SIDE, 3), dtype=np.uint8
    )
    vis = see(model, jnp.asarray(pictures, jnp.float32) / 255.0)
    group, first = batch.composed, 10
    assert group.vis_idx.max() == (first + len(group.ids)) * FEATURES - 1
    with_ecr, without, _ = run(model, group, vis)

    def png(picture: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        return out.getvalue()

    items, bare = [], []
    for row, ids in enumerate(group.ids):
        text = tokenizer.decode(ids[: group.prompt[row]].tolist())
        change = text.split("Change: ")[1].split("\nassistant")[0]
        content = Content.of(change, png(pictures[first + row]))
        ecr = tokenizer.decode(ids[group.prompt[row] : group.end[row]].tolist())
        items.append(EmbedItem(content, Side.QUERY, ecr))
        bare.append(EmbedItem(content, Side.QUERY))
    with Embedder.from_pretrained(tmp_path / "model") as embedder:
        np.testing.assert_allclose(np.asarray(with_ecr), embedder.embed(items), atol=2e-4)
        np.testing.assert_allclose(np.asarray(without), embedder.embed(bare), atol=2e-4)
    apart = np.asarray(with_ecr) @ np.asarray(with_ecr).T
    assert apart[~np.eye(len(apart), dtype=bool)].min() < 0.999  # the inputs are told apart


def test_contrast_by_hand() -> None:
    eye = jnp.eye(3)
    # Queries 0 and 2 share document 0; documents 0 and 1 show the same concept.
    concepts, answers = jnp.array([5, 5, 9]), jnp.array([0, 2, 0])
    queries = eye[jnp.array([0, 2, 0])]
    loss = contrast(queries, eye, jnp.asarray(2.0), concepts, answers)
    e2 = np.exp(2.0)
    # Query 0: document 1 is the same concept and masked, document 2 is the only negative.
    forward = np.mean([np.log((e2 + 1) / e2), np.log((e2 + 2) / e2), np.log((e2 + 1) / e2)])
    # Document 0 has two queries at the same similarity and one negative; document 1 has none.
    column0 = np.log((2 * e2 + 1) / e2)
    column2 = np.log((e2 + 2) / e2)
    np.testing.assert_allclose(loss, 0.5 * (forward + (column0 + column2) / 3), rtol=1e-5)
