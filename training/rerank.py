"""Stage 3: the text-only reranker (ECRR), a small Qwen3 that says yes or no.

    python -m training.rerank --rows .data/runs/rerank/rows.jsonl

Rows are written by `builtin.rerank_rows`: a query text, candidates in the reasoner's words, and
which of them are right. Loss: binary cross-entropy on each yes/no (so that the score is a
probability) plus a softmax over the list (so that the order is right), which `--listwise 0` leaves
out. The decoder starts from the unified model's; that Qwen3 normalises queries and keys is all that
it has to get used to. Or `--start` is any Qwen3 directory, which goes on in full, with its own
tokenizer and prompts, and is exported as a whole directory:

    python -m training.rerank --rows rows.jsonl --start models/Qwen3-Reranker-0.6B \
        --prefix-room 256 --suffix-room 256 --lr 1e-5
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

from training import builtin
from training.builtin.pairs import Leaf
from training.checkpoint import Checkpoints
from training.optimiser import muon
from training.prefetch import prefetch
from training.stopping import StopRequest
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.models.text import KVCache
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.weights import convert, hf


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      rows: JSONL of {"query": str, "candidates": [str], "labels": [0 or 1]}.
      tokenizer: of a reranker that starts from a unified model.
      start: unified model directory whose decoder is taken over, or a Qwen3 directory.
      prefix_room, suffix_room: tokens of a query and of a candidate; what is longer is cut.
      listwise: weight of the softmax over the list.
      lists, candidates: a step reads `lists` rows with `candidates` of their candidates each.
    """

    rows: Path = Path(".data/runs/rerank/rows.jsonl")
    tokenizer: Path = Path(".data/runs/tokenizer")
    start: Path = WEIGHTS_DIR / REASONER
    out: Path = Path(".data/runs/rerank")
    lists: int = 16
    candidates: int = 6
    prefix_room: int = 40
    suffix_room: int = 36
    listwise: float = 1.0
    steps: int = 300
    lr: float = 2e-3
    warmup: int = 40
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lists:
    """One batch: prefixes [B Tp], suffixes [B C Ts] with their lengths, and labels [B C]."""

    prefix: Leaf
    prefix_length: Leaf
    suffix: Leaf
    suffix_length: Leaf
    labels: Leaf


class RowSource:
    """Reads the rows and lays out batches; batch i depends on (seed, i) alone."""

    def __init__(self, path: Path, prompts: PromptSet, config: Config) -> None:
        self._rows = [json.loads(line) for line in path.read_text().splitlines()]
        self._prompts = prompts
        self._config = config

    def batches(self, start: int) -> Iterator[Lists]:
        step = start
        while True:
            yield self._batch(np.random.default_rng((self._config.seed, step)))
            step += 1

    def _batch(self, rng: np.random.Generator) -> Lists:
        lists, count = self._config.lists, self._config.candidates
        room, after = self._config.prefix_room, self._config.suffix_room
        prefix = np.zeros((lists, room), np.int32)
        suffix = np.zeros((lists, count, after), np.int32)
        prefix_length = np.zeros(lists, np.int32)
        suffix_length = np.ones((lists, count), np.int32)
        labels = np.full((lists, count), -1, np.int32)  # -1: no candidate in this place
        for i, chosen in enumerate(rng.integers(len(self._rows), size=lists)):
            row = self._rows[chosen]
            ids = self._prompts.rerank_prefix(row["query"]).ids[-room:]
            prefix[i, : len(ids)], prefix_length[i] = ids, len(ids)
            for j, candidate in enumerate(self._choose(row, count, rng)):
                ids = self._prompts.rerank_suffix(row["candidates"][candidate]).ids[-after:]
                suffix[i, j, : len(ids)], suffix_length[i, j] = ids, len(ids)
                labels[i, j] = row["labels"][candidate]
        return Lists(prefix, prefix_length, suffix, suffix_length, labels)

    def _choose(self, row: dict, count: int, rng: np.random.Generator) -> np.ndarray:
        """A right one if there is one, then the best-ranked wrong ones first: rows are ranked."""
        labels = np.array(row["labels"])
        right = rng.permutation(np.flatnonzero(labels == 1))[:1]
        wrong = np.flatnonzero(labels == 0)
        weights = 1.0 / (1.0 + np.arange(len(wrong)))
        take = min(count - len(right), len(wrong))
        if take == 0:
            return right
        picked = rng.choice(wrong, take, replace=False, p=weights / weights.sum())
        return np.concatenate([right, picked])


def score(model: MultimodalLM, batch: Lists, yes: int, no: int) -> Array:
    """[B C] yes-minus-no logits; a list's candidates share the pass over their prefix."""
    lists, count, room = batch.suffix.shape
    columns = jnp.arange(batch.prefix.shape[1])
    _, (k, v) = model.forward(
        batch.prefix,
        valid=columns < batch.prefix_length[:, None],
        positions=jnp.broadcast_to(columns, (lists, 3, len(columns))),
    )
    lengths = jnp.repeat(batch.prefix_length, count)
    shared = KVCache(k=jnp.repeat(k, count, 1), v=jnp.repeat(v, count, 1), length=lengths)
    columns = jnp.arange(room)
    ends = batch.suffix_length.reshape(-1)
    hidden, _ = model.forward(
        batch.suffix.reshape(-1, room),
        valid=columns < ends[:, None],
        positions=jnp.broadcast_to(
            (lengths[:, None] + columns)[:, None, :], (lists * count, 3, room)
        ),
        prefix=shared,
    )
    last = hidden[jnp.arange(lists * count), ends - 1]
    head = model.text.head()
    return (last @ (head[:, yes] - head[:, no])).astype(jnp.float32).reshape(lists, count)


def main(config: Config) -> None:
    # --- data -------------------------------------------------------------------------------
    whole = model_config(config.start).model_type == "qwen3"
    tokenizer = Tokenizer.from_dir(config.start if whole else config.tokenizer)
    prompts = PromptSet.from_dir(config.start) if whole else PromptSet("mini", tokenizer)
    yes, no = prompts.yes_id, prompts.no_id
    source = RowSource(config.rows, prompts, config)

    # --- model and optimiser ------------------------------------------------------------------
    if whole:
        model = hf.load(config.start)
    else:
        model = MultimodalLM(builtin.reranker_config(tokenizer), rngs=nnx.Rngs(config.seed))
        start = hf.load(config.start).text
        model.text.embed_vd[...] = start.embed_vd[...]
        for name, weight in vars(model.text.layers).items():
            if isinstance(weight, nnx.Param) and hasattr(start.layers, name):
                # Not the norms of queries and keys, which only the reranker has.
                weight[...] = getattr(start.layers, name)[...]
    tx = muon(
        lr=config.lr, warmup=config.warmup, steps=config.steps, weight_decay=config.weight_decay
    )
    opt_state = tx.init(model)  # pyright: ignore[reportArgumentType]  # NNX modules are pytrees

    # --- step -------------------------------------------------------------------------------
    def loss_of(model: MultimodalLM, batch: Lists):
        margin = score(model, batch, yes, no)
        here = batch.labels >= 0
        right = batch.labels == 1
        bce = optax.sigmoid_binary_cross_entropy(margin, right.astype(jnp.float32))
        # One right answer among several: weigh both sides alike, or "no" to all is a good start.
        weight = jnp.where(right, 2.0, 1.0) * here
        pointwise = jnp.sum(bce * weight) / jnp.sum(weight)
        logits = jnp.where(here, margin, -1e9)
        has = right.any(1)
        target = right / jnp.maximum(right.sum(1, keepdims=True), 1)
        listwise = jnp.sum(optax.softmax_cross_entropy(logits, target) * has) / jnp.sum(has)
        first = (right[jnp.arange(len(logits)), logits.argmax(1)] * has).sum() / has.sum()
        return pointwise + config.listwise * listwise, {
            "bce": pointwise,
            "list": listwise,
            "first": first,
        }

    @jax.jit(donate_argnums=(0, 1))
    def train_step(model, opt_state, batch):
        grads, metrics = jax.grad(loss_of, has_aux=True)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, metrics

    # --- restore ----------------------------------------------------------------------------
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config.out / "checkpoints")
    step = checkpoints.latest() or 0
    if step:
        model, opt_state = jax.jit(lambda t: t)(checkpoints.restore(step, (model, opt_state)))
        print(f"resumed at step {step}")

    # --- loop -------------------------------------------------------------------------------
    log = (config.out / "metrics.jsonl").open("a")
    batches = prefetch(source.batches(step))
    since, timed, seen = time.time(), step, []
    with StopRequest() as stop:
        stopped = False
        while step < config.steps and not stopped:
            model, opt_state, metrics = train_step(model, opt_state, next(batches))
            seen.append(metrics)
            step += 1
            stopped = stop.asked()
            if step % 20 == 0 or step == config.steps:
                row = {k: round(float(np.mean([m[k] for m in seen])), 4) for k in metrics}
                row |= {
                    "step": step,
                    "s_per_step": round((time.time() - since) / (step - timed), 2),
                }
                if not np.isfinite(sum(row.values())):
                    raise RuntimeError(f"the loss is not finite at step {step}: {row}")
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
                since, timed, seen = time.time(), step, []
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                checkpoints.save(step, (model, opt_state))
        checkpoints.close()
    if stopped:
        stop.leave()
    if whole:
        convert.export_like(model, config.start, config.out / "export")
    else:
        hf.export(model, config.out / "export")


if __name__ == "__main__":
    main(tyro.cli(Config))
