"""Stage 2: one Qwen2-VL that reasons and embeds.

    python -m training.builtin.unified --data .data/emoji --vision .data/runs/vision/visual.npz

Next-token loss on the ECR and contrastive loss on the end token, from the same pass. Every sequence
ends twice, after its ECR and right after the prompt, so "no reasoning" is trained as well and the
comparison between the two is fair. Some ECRs are replaced by those of look-alikes, and at the end
by the model's own (`builtin.own`): at serving time the reasoner errs, and an embedder that only
ever saw true ECRs would follow it blindly. The vision tower comes from `builtin.vision` and stays
as it is; the embedding table comes from there too and goes on learning. The paper found joint
training to hurt a pretrained 7B backbone; here both skills start from nothing and see as one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array

from training import builtin, launch
from training.builtin import images, sampling, texts
from training.builtin.packing import ALONE, ECR, Packed
from training.builtin.pairs import Batch, Mix, PairSource
from training.builtin.seeing import prototypes, see, style_residuals
from training.checkpoint import Checkpoints
from training.data.emoji import EmojiData, load
from training.optimiser import muon
from training.prefetch import prefetch
from training.stopping import StopRequest
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.nn.norms import l2_normalise
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.weights import convert, hf


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      vision: `visual.npz` written by `training.builtin.vision`.
      start: a model directory to go on from; its tokenizer and tower take the place of `tokenizer`
        and `vision`, and `export` below `out` is a whole directory like it. None = begin with
        those; `export` holds the weights alone.
      own: what `training.builtin.own` wrote; shown in place of most true ECRs (`mix.own`).
      mined: a sealed round of `training.loop` over these data; concepts of its queries and of their
        negatives are drawn together (`mix.mined`).
      tokenizer: folder written by `training.builtin.tokenizer`.
      steps: optimiser steps; warm-up, then cosine to a hundredth.
      until: stop after this step, in the middle of the schedule; 0 = go to its end. A run with the
        same `out` goes on where the last one stopped.
      lm_weight: weight of the next-token loss, a mean over tokens, beside the contrastive one. One
        or two of an ECR's twenty tokens tell what the picture shows, the others follow from them,
        so with a small weight the reasoner sees less well than the embedder.
      tower: a frozen tower is that of `vision` or `start`, whatever a checkpoint holds.
      style_noise: how often a picture's features are moved as far as another art style would.
      feature_std: vision features and the embedding table are both rescaled to this spread at the
        start, so that the decoder reads both alike.
    """

    data: Path = Path(".data/emoji")
    tokenizer: Path = Path(".data/runs/tokenizer")
    vision: Path = Path(".data/runs/vision/visual.npz")
    start: Path | None = None
    own: Path | None = None
    mined: Path | None = None
    out: Path = Path(".data/runs/unified")
    mix: Mix = field(default_factory=Mix)
    steps: int = 2000
    until: int = 0
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 40
    lm_weight: float = 6.0
    tower: Literal["frozen", "train"] = "frozen"
    style_noise: float = 0.6
    feature_std: float = 0.1
    checkpoint_every: int = 100
    eval_every: int = 100
    seed: int = 0


class Trained(nnx.Module):
    """What the optimiser sees: the model, the temperature, and a proxy for every concept.

    A batch holds about a hundred documents, so in-batch negatives alone teach a hundred-way choice
    where thousands are needed. Every embedding is therefore also classified against learnt proxies
    of all training concepts (proxy-NCA); the proxies are thrown away.
    """

    def __init__(self, model: MultimodalLM, proxies: Array) -> None:
        self.model = model
        self.proxies_cd = nnx.Param(proxies)
        self.log_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))


def begun(model: MultimodalLM, saved: Mapping[str, np.ndarray], std: float, sample: np.ndarray):
    """Put what `builtin.vision` saved into `model`: features and embedding table, each brought to
    the given standard deviation. `sample` [M S S 3] uint8 pictures measure the features."""
    graph, state = nnx.split(model.visual)
    structure = jax.tree.structure(state)
    leaves = [jnp.asarray(saved[str(i)]) for i in range(structure.num_leaves)]
    model.visual = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
    spread = float(jnp.std(see(model, jnp.asarray(sample, jnp.float32) / 255.0)))
    for name in ("merge2_gd", "merge2_bias_d"):
        param = getattr(model.visual, name)
        param[...] = param[...] * (std / spread)
    table = saved["embed_vd"]
    model.text.embed_vd[...] = jnp.asarray(table * (std / table.std()))


def restyled(key: Array, vis: Array, residuals: Array, often: float) -> Array:
    """`vis` [M * F, D] with a random share of a random residual added to some pictures."""
    pictures = len(vis) // residuals.shape[1]
    keys = jax.random.split(key, 3)
    which = jax.random.randint(keys[0], (pictures,), 0, len(residuals))
    share = jax.random.uniform(keys[1], (pictures, 1, 1))
    share *= jax.random.bernoulli(keys[2], often, (pictures, 1, 1))
    return vis + (share * residuals[which]).reshape(vis.shape)


def run(model: MultimodalLM, packed: Packed, vis: Array) -> tuple[Array, Array, Array]:
    """(with ECR [S D], without [S D], next-token loss summed) of packed sequences."""
    length = packed.ids.shape[1]
    same = packed.sequence[:, :, None] == packed.sequence[:, None, :]
    skipped = (packed.part[:, :, None] == ALONE) & (packed.part[:, None, :] == ECR)
    hidden, _ = model.forward(
        packed.ids,
        valid=packed.sequence >= 0,
        positions=packed.positions,
        vis=vis,
        vis_idx=packed.vis_idx,
        mask=jnp.tril(jnp.ones((length, length), bool)) & same & ~skipped,
        unroll=True,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(flat[packed.asked]), packed.targets
    )
    with_ecr, without = l2_normalise(flat[packed.end]), l2_normalise(flat[packed.alone])
    return with_ecr, without, jnp.sum(nll * packed.weights)


def contrast(
    queries: Array, documents: Array, scale: Array, concepts: Array, answers: Array
) -> Array:
    """Symmetric InfoNCE in float32; other documents of the same concept are no negatives.

    Args:
      queries: [Q D], L2-normalised.
      documents: [B D], L2-normalised.
      scale: inverse temperature.
      concepts: [B] of each document.
      answers: [Q] document of each query; several queries may share one.
    """
    logits = scale * jnp.matmul(queries, documents.T, preferred_element_type=jnp.float32)
    same = concepts[answers][:, None] == concepts[None, :]
    right = answers[:, None] == jnp.arange(len(concepts))[None, :]
    logits = jnp.where(same & ~right, -1e9, logits)
    forward = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
    over_queries = jax.nn.log_softmax(logits, axis=0)
    share = right / right.sum(0, keepdims=True)
    backward = -jnp.sum(over_queries * share, axis=0)
    return 0.5 * (forward.mean() + backward.mean())


def classify(embeddings: Array, proxies: Array, scale: Array, concepts: Array) -> Array:
    """Cross-entropy of each embedding over all concepts' proxies; [B D], [C D], [B] → scalar."""
    logits = scale * jnp.matmul(embeddings, l2_normalise(proxies).T)
    return optax.softmax_cross_entropy_with_integer_labels(logits, concepts).mean()


def first_proxies(model: MultimodalLM, source: PairSource, rows: int = 64) -> Array:
    """[C, D]: where the model, as it is, puts the label of each training concept."""
    encode = jax.jit(lambda labels: run(model, labels, jnp.zeros((1, builtin.VISION.out_size)))[1])
    parts = [np.asarray(encode(labels)) for labels in source.labels(rows)]
    return jnp.asarray(np.concatenate(parts)[: source.concepts])


class Unseen:
    """Text against the pictures of the unseen style, without reasoning, as training goes on."""

    def __init__(self, data: EmojiData, source: PairSource, chunk: int = 128) -> None:
        rows = [
            r for r in data.rows("heldout_style") if not data.concepts[data.concept_ids[r]].tones
        ]
        rows += [rows[-1]] * (-len(rows) % chunk)
        self._pictures = data.images[rows]
        said = [texts.label(data.concepts[data.concept_ids[r]]) for r in rows]
        self._seen = source.bare([source.place("", True)] * chunk, pictures=True)
        self._asked = [
            source.bare([source.place(t, False) for t in part])
            for part in (said[i : i + chunk] for i in range(0, len(said), chunk))
        ]
        self._chunk = chunk
        self._look = jax.jit(lambda model, pixels: run(model, self._seen, see(model, pixels))[1])
        self._read = jax.jit(
            lambda model, asked: run(model, asked, jnp.zeros((1, builtin.VISION.out_size)))[1]
        )

    def evaluate(self, model: MultimodalLM) -> dict[str, float]:
        """hit@1 and hit@10 of each label among all plain pictures of the unseen style."""
        pool, asked = [], []
        for part, group in enumerate(self._asked):
            pictures = self._pictures[part * self._chunk :][: self._chunk] / np.float32(255)
            pixels = jax.image.resize(
                pictures, (self._chunk, builtin.SIDE, builtin.SIDE, 3), "linear", antialias=True
            )
            pool.append(np.asarray(self._look(model, pixels)))
            asked.append(np.asarray(self._read(model, group)))
        scores = np.concatenate(asked) @ np.concatenate(pool).T
        rank = (scores > np.diag(scores)[:, None]).sum(1)
        return {f"unseen_hit{k}": round(float((rank < k).mean()), 4) for k in (1, 10)}


def main(config: Config) -> None:
    launch.keep_freed_memory()
    # --- data -------------------------------------------------------------------------------
    data = load(config.data)
    tokenizer = Tokenizer.from_dir(config.start or config.tokenizer)
    rules = sampling.colour_rules(data)
    gentle, may_flip = jnp.asarray(rules.gentle), jnp.asarray(rules.may_flip)

    # --- model and optimiser ------------------------------------------------------------------
    if config.start is None:
        model = MultimodalLM(builtin.unified_config(tokenizer), rngs=nnx.Rngs(config.seed))
        sample = data.images[np.sort(data.rows("train")[:: max(len(data.rows("train")) // 64, 1)])]
        begun(model, np.load(config.vision), config.feature_std, sample)
    else:
        model = hf.load(config.start, dtype=jnp.float32)
    frozen = config.tower == "frozen"
    tower = jax.tree.map(jnp.copy, model.visual)
    residuals = style_residuals(model, data)
    source = PairSource(
        data,
        tokenizer,
        builtin.IMAGES,
        prototypes=prototypes(model, data, sampling.image_table(data)),
        seed=config.seed,
        own=config.own,
        mined=config.mined,
    )
    trained = Trained(model, first_proxies(model, source))
    tx = muon(
        lr=config.lr, warmup=config.warmup, steps=config.steps, weight_decay=config.weight_decay
    )
    opt_state = tx.init(trained)  # pyright: ignore[reportArgumentType]  # NNX modules are pytrees

    # --- step -------------------------------------------------------------------------------
    def loss_of(trained: Trained, key: Array, batch: Batch):
        pixels = images.augment(
            key,
            batch.pictures,
            gentle=gentle[batch.picture_concepts],
            may_flip=may_flip[batch.picture_concepts],
            size=builtin.SIDE,
        )
        model = trained.model
        vis = see(model, pixels)
        if frozen:
            vis = jax.lax.stop_gradient(vis)
        vis = restyled(jax.random.fold_in(key, 1), vis, residuals, config.style_noise)
        count = len(batch.concepts)
        with_ecr, without, lm = run(model, batch.packed, vis)
        told = len(batch.proxies)
        with_ecr, without = with_ecr[:told], without[:told]
        d_with, qw = with_ecr[:count], with_ecr[count:]
        d_none, qn = without[:count], without[count:]
        scale = jnp.exp(trained.log_scale[...])
        concepts = batch.concepts
        losses = {
            "with": contrast(qw, d_with, scale, concepts, batch.answers),
            "none": contrast(qn, d_none, scale, concepts, batch.answers),
            "mixed": contrast(qn, d_with, scale, concepts, batch.answers),
            "lm": lm / batch.packed.weights.sum(),
        }
        proxies, of = trained.proxies_cd[...], batch.proxies
        losses["proxy_with"] = classify(with_ecr, proxies, scale, of)
        losses["proxy_none"] = classify(without, proxies, scale, of)
        total = 0.5 * (losses["with"] + losses["none"] + losses["mixed"])
        total += losses["proxy_with"] + losses["proxy_none"]
        total += config.lm_weight * losses["lm"]
        hit = (jnp.matmul(qn, d_none.T).argmax(1) == batch.answers).mean()
        return total, {**losses, "hit_none": hit, "scale": scale}

    @jax.jit(donate_argnums=(0, 1))
    def train_step(trained, opt_state, step, batch):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
        grads, metrics = jax.grad(loss_of, has_aux=True)(trained, key, batch)
        updates, opt_state = tx.update(grads, opt_state, trained)
        if frozen:  # or weight decay would shrink it
            still = jax.tree.map(jnp.zeros_like, trained.model.visual)
            updates.model.visual = still  # pyright: ignore[reportAttributeAccessIssue]  # a Trained
        trained = cast(Trained, optax.apply_updates(trained, updates))
        # Here and not in the loss, whose gradient would end at the bound.
        trained.log_scale[...] = jnp.minimum(trained.log_scale[...], np.log(100.0))
        return trained, opt_state, metrics

    # --- restore ----------------------------------------------------------------------------
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.json").write_text(json.dumps(asdict(config), default=str, indent=2))
    checkpoints = Checkpoints(config.out / "checkpoints")
    step = checkpoints.latest() or 0
    if step:
        trained, opt_state = jax.jit(lambda t: t)(checkpoints.restore(step, (trained, opt_state)))
        print(f"resumed at step {step}")
    if frozen:
        trained.model.visual = tower

    # --- loop -------------------------------------------------------------------------------
    unseen = Unseen(data, source)
    log = (config.out / "metrics.jsonl").open("a")
    batches = prefetch(source.batches(step, config.mix))
    since, timed = time.time(), step
    last = min(config.until or config.steps, config.steps)
    with StopRequest() as stop:
        stopped = False
        while step < last and not stopped:
            trained, opt_state, metrics = train_step(trained, opt_state, step, next(batches))
            step += 1
            stopped = stop.asked()
            if step % 20 == 0 or step == last:
                row = {k: round(float(v), 4) for k, v in metrics.items()}
                seconds = (time.time() - since) / (step - timed)
                row |= {"step": step, "s_per_step": round(seconds, 2)}
                if step % config.eval_every == 0 or step == last:
                    row |= unseen.evaluate(trained.model)
                if not np.isfinite(sum(row.values())):
                    raise RuntimeError(f"the loss is not finite at step {step}: {row}")
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
                since, timed = time.time(), step
            if step % config.checkpoint_every == 0 or step == last or stopped:
                checkpoints.save(step, (trained, opt_state))
        checkpoints.close()
    if stopped:
        stop.leave()
    if config.start is None:
        hf.export(trained.model, config.out / "export")
    else:
        convert.export_like(trained.model, config.start, config.out / "export")


if __name__ == "__main__":
    main(tyro.cli(Config))
