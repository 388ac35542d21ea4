"""Stage 1: teach the vision tower to see, before any text model reads it.

    python -m training.vision --data .data/emoji --out .data/runs/vision

A supervised warm start: from the mean of the merged vision features, linear heads name the family,
group, subgroup, gender, skin tone and hair of the picture and the words of its label and tags. The
heads are thrown away; the tower goes into the unified model (`training.unified`). Two phases, small
pictures first: attention and patches are resolution-free, and most of seeing is learnt cheaply.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array

from training import builtin, images, sampling
from training.checkpoint import Checkpoints
from training.data.emoji import EmojiData, load
from training.optimiser import adamw
from training.prefetch import prefetch
from training.words import concept_words
from tte_jax.models.vision import VisionTower


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      data: folder built by `training.data.emoji`.
      out: folder of checkpoints and metrics.
      phases: (picture side in pixels, steps, batch) one after another.
      lr: peak learning rate; warm-up, then cosine to zero over all phases.
      seed: of weights, sampling and augmentation.
    """

    data: Path = Path(".data/emoji")
    out: Path = Path(".data/runs/vision")
    phases: tuple[tuple[int, int, int], ...] = (
        (56, 1500, 128),
        (84, 900, 128),
        (112, 250, 128),
        (84, 1350, 128),
    )
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 150
    label_smoothing: float = 0.1
    checkpoint_every: int = 250
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
    """The vision tower with its throw-away heads."""

    def __init__(self, classes: dict[str, int], *, rngs: nnx.Rngs) -> None:
        self.visual = VisionTower(builtin.VISION, rngs=rngs)
        self.heads = Heads(builtin.VISION.out_size, classes, rngs=rngs)

    def __call__(self, pixels: Array) -> dict[str, Array]:
        """pixels [B S S 3] in [0, 1] → logits by head."""
        patches = images.to_patches(pixels)
        hw = jnp.asarray(images.patch_coordinates(pixels.shape[1]))
        hw = jnp.broadcast_to(hw, (patches.shape[0], *hw.shape))
        segments = jnp.ones(patches.shape[:2], jnp.int32)
        return self.heads(self.visual(patches, hw, segments).mean(axis=1))


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


def batches(
    data: EmojiData, table: sampling.ImageTable, batch: int, start: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images [B 112 112 3] uint8, concept ids [B]); batch i depends on (seed, i) only."""
    step = start
    while True:
        rng = np.random.default_rng((seed, step))
        picked = rng.choice(len(table.concepts), batch, p=table.weights)
        rows = [sampling.pick_row(table, int(i), rng) for i in picked]
        yield np.stack([data.images[r] for r in rows]), table.concepts[picked]
        step += 1


def main(config: Config) -> None:
    # --- data -------------------------------------------------------------------------------
    data = load(config.data)
    table = sampling.image_table(data)
    rules = sampling.colour_rules(data)
    ids, words, classes = label_table(data)
    labels = {k: jnp.asarray(v) for k, v in ids.items()}
    words_cw, gentle, may_flip = map(jnp.asarray, (words, rules.gentle, rules.may_flip))
    unseen_style = data.rows("heldout_style")
    eval_rows = np.random.default_rng(1).permutation(unseen_style)[:768]

    # --- model and optimiser ------------------------------------------------------------------
    model = Classifier(classes, rngs=nnx.Rngs(config.seed))
    total = sum(steps for _, steps, _ in config.phases)
    tx = adamw(lr=config.lr, warmup=config.warmup, steps=total, weight_decay=config.weight_decay)
    graph, params = nnx.split(model)
    opt_state = tx.init(params)

    # --- steps ------------------------------------------------------------------------------
    def loss_of(params: nnx.State, key: Array, pictures: Array, concepts: Array, size: int):
        pixels = images.augment(
            key, pictures, gentle=gentle[concepts], may_flip=may_flip[concepts], size=size
        )
        out = nnx.merge(graph, params)(pixels)
        losses = {}
        for name, weight in WEIGHTS.items():
            target = optax.smooth_labels(
                jax.nn.one_hot(labels[name][concepts], classes[name]), config.label_smoothing
            )
            losses[name] = weight * optax.softmax_cross_entropy(out[name], target).mean()
        losses["words"] = 0.5 * optax.softmax_cross_entropy(out["words"], words_cw[concepts]).mean()
        hits = (out["family"].argmax(-1) == labels["family"][concepts]).mean()
        return sum(losses.values()), {**losses, "family_accuracy": hits}

    @jax.jit(static_argnames="size", donate_argnums=(0, 1))
    def train_step(params, opt_state, step, pictures, concepts, size):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        grads, metrics = jax.grad(loss_of, has_aux=True)(params, key, pictures, concepts, size)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    @jax.jit(static_argnames="size")
    def classify(params, pictures, size):
        pixels = pictures.astype(jnp.float32) / 255.0
        pixels = jax.image.resize(pixels, (len(pixels), size, size, 3), "linear", antialias=True)
        out = nnx.merge(graph, params)(pixels)
        return out["family"].argmax(-1), out["gender"].argmax(-1), out["skin"].argmax(-1)

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
        return {"unseen_family": family, "unseen_gender": gender, "unseen_skin": skin}

    # --- restore ----------------------------------------------------------------------------
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config.out / "checkpoints")
    step = checkpoints.latest() or 0
    if step:
        params, opt_state = jax.jit(lambda t: t)(checkpoints.restore(step, (params, opt_state)))
        print(f"resumed at step {step}")

    # --- loop -------------------------------------------------------------------------------
    log = (config.out / "metrics.jsonl").open("a")
    end = 0
    for size, steps, batch in config.phases:
        begin, end = end, end + steps
        if step >= end:
            continue
        source = prefetch(batches(data, table, batch, max(step, begin), config.seed))
        since, timed = time.time(), step
        while step < end:
            pictures, concepts = next(source)
            params, opt_state, metrics = train_step(
                params, opt_state, step, pictures, concepts, size
            )
            step += 1
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
            if step % config.checkpoint_every == 0 or step == total:
                checkpoints.save(step, (params, opt_state))
    checkpoints.close()

    # --- result -----------------------------------------------------------------------------
    model = nnx.merge(graph, params)
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(model.visual))}
    np.savez(config.out / "visual.npz", **leaves)  # pyright: ignore[reportArgumentType]  # names are digits
    print(f"wrote {config.out / 'visual.npz'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
