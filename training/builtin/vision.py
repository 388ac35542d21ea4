"""Stage 1: teach the vision tower to see, before any text model reads it.

    python -m training.builtin.vision --data .data/emoji --out .data/runs/vision

A supervised warm start: from the mean of the merged vision features, linear heads name the family,
group, subgroup, gender, skin tone and hair of the picture and the words of its label and tags. The
same mean is drawn to the mean of the token embeddings of what is said about the picture (InfoNCE),
so that features and token embeddings share one space before a decoder reads them. The heads are
thrown away; the tower and the embedding table go into the unified model (`builtin.unified`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array

from training import builtin, launch
from training.builtin import images, sampling, texts
from training.builtin.words import concept_words
from training.checkpoint import Checkpoints
from training.data.emoji import EmojiData, load
from training.optimiser import adamw, muon
from training.prefetch import prefetch
from training.stopping import StopRequest
from tte_jax.models.vision import VisionTower
from tte_jax.nn.norms import l2_normalise
from tte_jax.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      data: folder built by `training.data.emoji`.
      out: folder of checkpoints and metrics.
      phases: (picture side in pixels, steps, batch) one after another.
      optimiser, lr: peak learning rate; warm-up, then cosine to zero over all phases.
      seed: of weights, sampling and augmentation.
    """

    data: Path = Path(".data/emoji")
    tokenizer: Path = Path(".data/runs/tokenizer")
    out: Path = Path(".data/runs/vision")
    phases: tuple[tuple[int, int, int], ...] = ((56, 2000, 256),)
    optimiser: Literal["adamw", "muon"] = "muon"
    lr: float = 2.5e-3
    weight_decay: float = 0.1
    warmup: int = 100
    label_smoothing: float = 0.1
    checkpoint_every: int = 100
    eval_every: int = 250
    seed: int = 0


class Heads(nnx.Module):
    """Linear classifiers on the pooled features, one per label."""

    def __init__(self, size: int, classes: dict[str, int], *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        for name, n in classes.items():
            setattr(self, name, nnx.Linear(size, n, rngs=rngs))

    def __call__(self, z: Array) -> dict[str, Array]:
        z = self.norm(z)
        return {k: f(z) for k, f in vars(self).items() if isinstance(f, nnx.Linear)}


class Classifier(nnx.Module):
    """The vision tower with its throw-away heads, and a table of token embeddings."""

    def __init__(self, classes: dict[str, int], vocabulary: int, *, rngs: nnx.Rngs) -> None:
        size = builtin.VISION.out_size
        self.visual = VisionTower(builtin.VISION, rngs=rngs)
        self.heads = Heads(size, classes, rngs=rngs)
        self.embed_vd = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocabulary, size)))
        self.log_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))

    def see(self, pixels: Array) -> Array:
        """pixels [B S S 3] in [0, 1] → the mean of the merged features [B D]."""
        patches = images.to_patches(pixels)
        hw = jnp.asarray(images.patch_coordinates(pixels.shape[1]))
        hw = jnp.broadcast_to(hw, (patches.shape[0], *hw.shape))
        segments = jnp.ones(patches.shape[:2], jnp.int32)
        return self.visual(patches, hw, segments, unroll=True).mean(axis=1)

    def read(self, ids: Array) -> Array:
        """Token ids [B T], -1 at pads → the mean of their embeddings, L2-normalised [B D]."""
        rows = jnp.take(self.embed_vd[...], jnp.maximum(ids, 0), axis=0)
        return l2_normalise(jnp.sum(jnp.where((ids >= 0)[..., None], rows, 0.0), axis=1))


SAID = 20  # tokens of a text that are read
ALIGN_WEIGHT = 1.0
LABELS = ("family", "group", "subgroup", "gender", "skin", "hair")
WEIGHTS = {"family": 1.0, "group": 0.1, "subgroup": 0.2, "gender": 0.3, "skin": 0.3, "hair": 0.1}


def label_table(data: EmojiData) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, int]]:
    """Class ids per concept and label, the word matrix [concepts, W], and the class counts."""
    ids, classes = {}, {}
    for name in LABELS:
        names, inverse = np.unique([getattr(c, name) for c in data.concepts], return_inverse=True)
        ids[name], classes[name] = inverse.astype(np.int32), len(names)
    vocabulary = sorted({w for c in data.concepts for w in concept_words(c)})
    index = {w: i for i, w in enumerate(vocabulary)}
    words = np.zeros((len(data.concepts), len(vocabulary)), np.float32)
    for row, concept in enumerate(data.concepts):
        for word in concept_words(concept):
            words[row, index[word]] = 1.0
    words /= np.maximum(words.sum(1, keepdims=True), 1.0)
    classes["words"] = len(vocabulary)
    return ids, words, classes


def encode(tokenizer: Tokenizer, said: list[str]) -> np.ndarray:
    """Texts as token ids [B SAID], cut to SAID tokens and filled up with -1."""
    ids = np.full((len(said), SAID), -1, np.int32)
    for row, text in enumerate(said):
        tokens = tokenizer.encode(" " + text)[:SAID]
        ids[row, : len(tokens)] = tokens
    return ids


def batches(
    data: EmojiData,
    table: sampling.ImageTable,
    tokenizer: Tokenizer,
    batch: int,
    start: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(images [B 112 112 3] uint8, concept ids [B], token ids of something said about each [B
    SAID]); batch i depends on (seed, i) only."""
    step = start
    while True:
        rng = np.random.default_rng((seed, step))
        picked = rng.choice(len(table.concepts), batch, p=table.weights)
        rows = [sampling.pick_row(table, int(i), rng) for i in picked]
        concepts = table.concepts[picked]
        said = [texts.text_query(data.concepts[c], rng) for c in concepts]
        pictures = np.stack([images.turned(data.images[r], rng) for r in rows])
        yield pictures, concepts, encode(tokenizer, said)
        step += 1


def main(config: Config) -> None:
    launch.keep_freed_memory()
    # --- data -------------------------------------------------------------------------------
    data = load(config.data)
    table = sampling.image_table(data)
    rules = sampling.colour_rules(data)
    ids, words, classes = label_table(data)
    labels = {k: jnp.asarray(v) for k, v in ids.items()}
    words_cw, gentle, may_flip = map(jnp.asarray, (words, rules.gentle, rules.may_flip))
    unseen_style = data.rows("heldout_style")
    eval_rows = np.random.default_rng(1).permutation(unseen_style)[:768]
    tokenizer = Tokenizer.from_dir(config.tokenizer)
    plain = [r for r in unseen_style if not data.concepts[data.concept_ids[r]].tones]
    asked = encode(tokenizer, [texts.label(data.concepts[data.concept_ids[r]]) for r in plain])

    # --- model and optimiser ------------------------------------------------------------------
    model = Classifier(classes, builtin.VOCABULARY, rngs=nnx.Rngs(config.seed))
    total = sum(steps for _, steps, _ in config.phases)
    optimiser = {"adamw": adamw, "muon": muon}[config.optimiser]
    tx = optimiser(
        lr=config.lr, warmup=config.warmup, steps=total, weight_decay=config.weight_decay
    )
    graph, params = nnx.split(model)
    opt_state = tx.init(params)

    # --- steps ------------------------------------------------------------------------------
    def loss_of(
        params: nnx.State, key: Array, pictures: Array, concepts: Array, said: Array, size: int
    ):
        pixels = images.augment(
            key, pictures, gentle=gentle[concepts], may_flip=may_flip[concepts], size=size
        )
        model = nnx.merge(graph, params)
        features = model.see(pixels)
        out = model.heads(features)
        scale = jnp.exp(jnp.minimum(model.log_scale[...], np.log(100.0)))
        logits = scale * l2_normalise(features) @ model.read(said).T
        same = (concepts[:, None] == concepts[None, :]) & ~jnp.eye(len(concepts), dtype=bool)
        logits = jnp.where(same, -1e9, logits)
        right = jnp.arange(len(concepts))
        align = [
            optax.softmax_cross_entropy_with_integer_labels(x, right).mean()
            for x in (logits, logits.T)
        ]
        losses = {"align": ALIGN_WEIGHT * (align[0] + align[1]) / 2}
        for name, weight in WEIGHTS.items():
            target = optax.smooth_labels(
                jax.nn.one_hot(labels[name][concepts], classes[name]), config.label_smoothing
            )
            losses[name] = weight * optax.softmax_cross_entropy(out[name], target).mean()
        losses["words"] = 0.5 * optax.softmax_cross_entropy(out["words"], words_cw[concepts]).mean()
        hits = (out["family"].argmax(-1) == labels["family"][concepts]).mean()
        return sum(losses.values()), {**losses, "family_accuracy": hits}

    @jax.jit(static_argnames="size", donate_argnums=(0, 1))
    def train_step(params, opt_state, step, pictures, concepts, said, size):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        grads, metrics = jax.grad(loss_of, has_aux=True)(
            params, key, pictures, concepts, said, size
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    @jax.jit(static_argnames="size")
    def look(params, pictures, size):
        pixels = pictures.astype(jnp.float32) / 255.0
        pixels = jax.image.resize(pixels, (len(pixels), size, size, 3), "linear", antialias=True)
        return nnx.merge(graph, params).see(pixels)

    @jax.jit(static_argnames="size")
    def classify(params, pictures, size):
        out = nnx.merge(graph, params).heads(look(params, pictures, size))
        return out["family"].argmax(-1), out["gender"].argmax(-1), out["skin"].argmax(-1)

    def retrieve(size: int) -> dict[str, float]:
        """Each label against all plain pictures of the unseen style, held-out families too."""
        parts = [look(params, data.images[p], size) for p in np.array_split(plain, 8)]
        pool = np.concatenate([np.asarray(p) for p in parts])
        pool /= np.linalg.norm(pool, axis=1, keepdims=True)
        scores = np.asarray(nnx.merge(graph, params).read(jnp.asarray(asked))) @ pool.T
        rank = (scores > np.diag(scores)[:, None]).sum(1)
        return {"unseen_hit1": float((rank < 1).mean()), "unseen_hit10": float((rank < 10).mean())}

    def evaluate(size: int) -> dict[str, float]:
        """Accuracy on the art style that is never trained on, seen and unseen combinations alike;
        held-out families cannot be named by a classifier and are left out."""
        rows = eval_rows[~data.heldout_concept[eval_rows]][:640]
        right = []
        for part in np.array_split(rows, 5):
            predicted = classify(params, jnp.asarray(data.images[np.sort(part)]), size)
            truth = data.concept_ids[np.sort(part)]
            right.append(
                [
                    np.asarray(p) == ids[k][truth]
                    for p, k in zip(predicted, ("family", "gender", "skin"), strict=True)
                ]
            )
        family, gender, skin = (np.concatenate(x).mean() for x in zip(*right, strict=True))
        found = {"unseen_family": family, "unseen_gender": gender, "unseen_skin": skin}
        return found | retrieve(size)

    # --- restore ----------------------------------------------------------------------------
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config.out / "checkpoints")
    step = checkpoints.latest() or 0
    if step:
        params, opt_state = jax.jit(lambda t: t)(checkpoints.restore(step, (params, opt_state)))
        print(f"resumed at step {step}")

    # --- loop -------------------------------------------------------------------------------
    log = (config.out / "metrics.jsonl").open("a")
    end, stopped = 0, False
    with StopRequest() as stop:
        for size, steps, batch in config.phases:
            begin, end = end, end + steps
            if step >= end or stopped:
                continue
            source = prefetch(batches(data, table, tokenizer, batch, max(step, begin), config.seed))
            since, timed = time.time(), step
            while step < end and not stopped:
                params, opt_state, metrics = train_step(
                    params, opt_state, step, *next(source), size
                )
                step += 1
                stopped = stop.asked()
                if step % 50 == 0:
                    row = {k: round(float(v), 4) for k, v in metrics.items()}
                    if step % config.eval_every == 0 or step == total:
                        row |= {k: round(float(v), 4) for k, v in evaluate(size).items()}
                    row |= {
                        "step": step,
                        "size": size,
                        "images_per_s": round((step - timed) * batch / (time.time() - since), 1),
                    }
                    if not np.isfinite(sum(v for v in row.values())):
                        raise RuntimeError(f"the loss is not finite at step {step}: {row}")
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    print(row, flush=True)
                    since, timed = time.time(), step
                if step % config.checkpoint_every == 0 or step == total or stopped:
                    checkpoints.save(step, (params, opt_state))
        checkpoints.close()
    if stopped:
        stop.leave()

    # --- result -----------------------------------------------------------------------------
    model = nnx.merge(graph, params)
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(model.visual))}
    leaves["embed_vd"] = np.asarray(model.embed_vd[...])
    np.savez(config.out / "visual.npz", **leaves)  # pyright: ignore[reportArgumentType]  # no such names
    print(f"wrote {config.out / 'visual.npz'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
