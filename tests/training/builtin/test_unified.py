"""What the unified trainer computes is what the roles serve."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.training.drawings import emoji_data
from training import builtin
from training.builtin import export, seeing, texts
from training.builtin.packing import ECR, PROMPT, Example, Packed, Packer
from training.builtin.pairs import FEATURES, Batch, Mix, Own, PairSource, lookalikes
from training.builtin.sampling import image_table
from training.builtin.seeing import see, style_residuals
from training.builtin.unified import contrast, restyled, run
from tte_jax.builtin.models import REASONER, path_of
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.stages import EmbedItem
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs

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
    packed = batch.packed
    learnt = {}
    for i, concept in enumerate(batch.concepts):
        shown = said(tokenizer, packed, i)
        truth = source.reasonings.of(concepts[concept])
        asked = packed.sequence.reshape(-1)[packed.asked] == i
        told = packed.targets[asked & (packed.weights > 0)].tolist()
        learnt[i] = bool(told)
        assert (shown == truth) == learnt[i]
        end = tokenizer.token_id("<|im_end|>")
        assert not told or (tokenizer.decode(told) == truth and told[-1] == end)
    assert len(set(learnt.values())) == 2


def test_coined_texts_are_learnt_and_answer_nothing(
    source: PairSource, batch: Batch, tokenizer: Tokenizer
) -> None:
    told, packed = len(batch.proxies), batch.packed
    assert told == len(batch.concepts) + len(batch.answers)
    assert len(packed.end) == told + MIX.coined
    of = packed.sequence.reshape(-1)[packed.asked[packed.weights > 0]]
    targets = packed.targets[packed.weights > 0]
    known = {texts.label(c) for c in emoji_data().concepts}
    for i in range(told, len(packed.end)):
        ecr = said(tokenizer, packed, i)
        answer = ecr.rsplit("Answer: ", 1)[1]
        assert answer not in known
        assert answer in said(tokenizer, packed, i, part=PROMPT)
        assert tokenizer.decode(targets[of == i].tolist()) == ecr
    assert np.isin(np.arange(told, len(packed.end)), of).all()


def said(tokenizer: Tokenizer, packed: Packed, sequence: int, part: int = ECR) -> str:
    """A part of a sequence as text, without control tokens."""
    ids = packed.ids[(packed.sequence == sequence) & (packed.part == part)].tolist()
    return tokenizer.decode(ids)


def test_packing_keeps_every_token(source: PairSource, tokenizer: Tokenizer) -> None:
    ecr = "<think>animal: cat</think>\nAnswer: cat"
    examples = [
        Example(source.place("", True), ecr, ecr, 0),
        Example(source.place("a much longer text about a cat", False), ecr, "Answer: dog", None),
        Example(source.place("cat", False), ecr, ecr, None),
    ]
    image = tokenizer.token_id("<|image_pad|>")
    packer = Packer(tokenizer, image_token=image, features=4)
    sizes = [len(e.prompt.ids) + len(tokenizer.encode_tagged(e.shown)) + 2 for e in examples]
    length = max(sizes) + min(sizes)
    assert packer.pack(examples, rows=1, length=length, targets=99) is None
    packed = packer.pack(examples, rows=2, length=length, targets=99)
    assert packed is not None
    assert (packed.sequence >= 0).sum() == sum(sizes)
    for i, example in enumerate(examples):
        assert said(tokenizer, packed, i) == example.shown
        end, alone = packed.end[i], packed.alone[i]
        assert alone == end + 1 and packed.ids.reshape(-1)[end] == packed.ids.reshape(-1)[alone]
        # The lone end stands where the ECR would begin.
        places = packed.positions.transpose(0, 2, 1).reshape(-1, 3)
        np.testing.assert_array_equal(places[alone], example.prompt.following)
    learnt = 2 * (len(tokenizer.encode_tagged(ecr)) + 1)
    assert packed.weights.sum() == learnt
    short = packer.pack(examples, rows=2, length=length, targets=learnt - 3)
    assert short is not None and short.weights.sum() == learnt - 3


def test_what_the_model_said_is_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = emoji_data()
    table = image_table(data)
    ids = [int(c) for c in table.concepts]
    cow = next(i for i in ids if data.concepts[i].name == "cow")
    judges = [i for i in ids if data.concepts[i].family == "judge"]
    row = int(np.flatnonzero(data.concept_ids == cow)[0])
    own = [Own(row, cow, "", "Answer: bull"), Own(-1, cow, "moo", "Answer: calf")]
    own += [Own(row, judge, "make it so", "Answer: court") for judge in judges]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(o._asdict()) for o in own))
    prototypes = np.random.default_rng(0).standard_normal((len(ids), 8))
    source = PairSource(data, tokenizer, builtin.IMAGES, prototypes=prototypes, seed=3, own=path)
    mix = Mix(text=4, image=1, composed=4, corrupt=0, corrupt_text=0, own=1.0)
    batches = source.batches(0, mix)
    batch = next(b for b in batches if cow in b.concepts[:4].tolist())
    at = batch.concepts.tolist().index(cow)
    assert said(tokenizer, batch.packed, at) == "Answer: bull"
    typed = len(batch.concepts) + at
    assert said(tokenizer, batch.packed, typed) == "Answer: calf"
    assert "Find: moo" in said(tokenizer, batch.packed, typed, PROMPT)
    for i in range(4):
        asked = len(batch.concepts) + 5 + i
        assert said(tokenizer, batch.packed, asked) == "Answer: court"
        assert "Change: make it so" in said(tokenizer, batch.packed, asked, PROMPT)
    assert set(batch.concepts[4:].tolist()) <= set(judges)


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
    packed, first = batch.packed, 10
    told = len(batch.proxies)
    composed = range(told - 4, told)
    assert packed.vis_idx.max() == (first + 4) * FEATURES - 1
    with_ecr, without, _ = (np.asarray(x) for x in run(model, packed, vis))
    with_ecr, without = with_ecr[told - 4 : told], without[told - 4 : told]

    def png(picture: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        return out.getvalue()

    items, bare = [], []
    for picture, sequence in zip(pictures[first:], composed, strict=True):
        text = said(tokenizer, packed, sequence, PROMPT)
        change = text.split("Change: ")[1].split("\nassistant")[0]
        content = Content.of(change, png(picture))
        items.append(EmbedItem(content, Side.QUERY, said(tokenizer, packed, sequence)))
        bare.append(EmbedItem(content, Side.QUERY))
    with Embedder.from_pretrained(tmp_path / "model") as embedder:
        np.testing.assert_allclose(with_ecr, embedder.embed(items), atol=2e-4)
        np.testing.assert_allclose(without, embedder.embed(bare), atol=2e-4)
    apart = with_ecr @ with_ecr.T
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


def test_features_are_moved_by_a_share_of_one_residual() -> None:
    residuals = jnp.stack([jnp.full((FEATURES, 3), 1.0), jnp.full((FEATURES, 3), 10.0)])
    vis = jnp.arange(40 * FEATURES * 3, dtype=jnp.float32).reshape(-1, 3)
    same = restyled(jax.random.key(0), vis, residuals, 0.0)
    np.testing.assert_array_equal(same, vis)
    moved = np.asarray(restyled(jax.random.key(0), vis, residuals, 0.5) - vis)
    moved = moved.reshape(40, FEATURES * 3)
    np.testing.assert_allclose(moved, moved[:, :1].repeat(FEATURES * 3, 1), atol=1e-3)
    assert 0.2 < (moved[:, 0] == 0).mean() < 0.8
    assert moved.min() >= 0 and 1 < moved.max() <= 10


def test_residuals_are_what_tells_styles_apart(tokenizer: Tokenizer) -> None:
    data = emoji_data()
    once = np.arange(len(data.images) // 2)
    # A third style: the first again, so that every concept has three drawings.
    data = replace(
        data,
        images=np.concatenate([data.images, data.images[once]]),
        concept_ids=np.concatenate([data.concept_ids, data.concept_ids[once]]),
        style_ids=np.concatenate([data.style_ids, np.full(len(once), 2)]),
        styles=[*data.styles, "twemoji"],
        variants=np.concatenate([data.variants, data.variants[once]]),
        masks={k: np.concatenate([v, v[once]]) for k, v in data.masks.items()},
    )
    model = MultimodalLM(builtin.unified_config(tokenizer), rngs=nnx.Rngs(0))
    residuals = np.asarray(style_residuals(model, data, concepts=2))
    assert residuals.shape == (6, FEATURES, builtin.VISION.out_size)
    for one in (residuals[:3], residuals[3:]):
        np.testing.assert_allclose(one.sum(0), 0, atol=1e-5)
        np.testing.assert_allclose(one[0], one[2], atol=1e-5)  # the drawing that is there twice
        assert np.abs(one[0] - one[1]).max() > 1e-4


def test_prototypes_are_the_mean_features_of_each_concepts_drawings(tokenizer: Tokenizer) -> None:
    data = emoji_data()
    model = MultimodalLM(builtin.unified_config(tokenizer), rngs=nnx.Rngs(0))
    table = image_table(data)
    found = seeing.prototypes(model, data, table)
    assert found.shape == (len(table.concepts), builtin.VISION.out_size)
    for index in (0, 7):
        rows = np.flatnonzero(data.concept_ids == table.concepts[index])
        pixels = jnp.asarray(data.images[rows], jnp.float32) / 255.0
        small = jax.image.resize(
            pixels, (len(rows), builtin.SIDE, builtin.SIDE, 3), "linear", antialias=True
        )
        np.testing.assert_allclose(found[index], see(model, small).mean(0), atol=1e-4)


def test_pictures_are_seen_in_order_whatever_is_left_for_the_last_pass(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = emoji_data()
    model = MultimodalLM(builtin.unified_config(tokenizer), rngs=nnx.Rngs(0))
    rows = np.array([3, 0, 7, 5, 1])
    together = np.concatenate(list(seeing.seen(model, data, rows)))
    monkeypatch.setattr(seeing, "_TOGETHER", 2)
    apart = list(seeing.seen(model, data, rows))
    assert [len(part) for part in apart] == [2, 2, 1]
    np.testing.assert_allclose(np.concatenate(apart), together, atol=1e-5)


def test_wrong_reasonings_need_prototypes(tokenizer: Tokenizer) -> None:
    source = PairSource(emoji_data(), tokenizer, builtin.IMAGES, prototypes=None, seed=3)
    next(source.batches(0, replace(MIX, corrupt=0.0, corrupt_text=0.0)))
    with pytest.raises(AssertionError, match="needs prototypes"):
        next(source.batches(0, replace(MIX, corrupt=1.0)))
