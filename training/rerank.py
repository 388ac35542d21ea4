"""Stage 3: the text-only reranker (ECRR), a small Qwen3 that says yes or no.

    python -m training.rerank --rows .data/runs/rerank/rows.jsonl

Rows are written by `builtin.rerank_rows`: a query text, candidates in the reasoner's words, and
which of them are right. Loss: binary cross-entropy on each yes/no (so that the score is a
probability) plus a softmax over the list (so that the order is right), which `--listwise 0` leaves
out. The decoder starts from the unified model's; that Qwen3 normalises queries and keys is all that
it has to get used to. Or `--start` is any Qwen3 directory or hub id, which goes on in full, with
its own tokenizer and prompts, and is exported as a whole directory:

    python -m training.rerank --config qwen3 --rows rows.jsonl --start models/Qwen3-Reranker-0.6B

SIGTERM and SIGINT end the run when it has saved; the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from training import builtin, configuration, launch, results
from training.builtin.pairs import Leaf
from training.checkpoint import RunCheckpoints, go_on
from training.optimiser import adamw, muon
from training.prefetch import prefetch
from training.stopping import StopRequest
from training.telemetry import Telemetry
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.json_lines import json_lines
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.models.text import KVCache
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.weights import convert, hf, hub


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      rows: JSONL of {"query": str, "candidates": [str], "labels": [0 or 1]}.
      tokenizer: of a reranker that starts from a unified model.
      start: unified model directory whose decoder is taken over, or a Qwen3 directory or hub id.
      prefix_room, suffix_room: tokens of a query and of a candidate; what is longer is cut.
      listwise: weight of the softmax over the list.
      lists, candidates: a step reads `lists` rows with `candidates` of their candidates each.
      optimiser: Muon is for small models that learn as a whole.
      warmup: steps in which the rate rises.
    """

    rows: Path = Path(".data/runs/rerank/rows.jsonl")
    tokenizer: Path = Path(".data/runs/tokenizer")
    start: Path = WEIGHTS_DIR / REASONER
    out: Path = Path(".data/runs/rerank")
    lists: int = 16
    candidates: int = 8
    prefix_room: int = 40
    suffix_room: int = 36
    listwise: float = 1.0
    steps: int = 300
    optimiser: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    warmup: int = 40
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    report_every: int = 20
    seed: int = 0


PRESETS = {
    "builtin": Config(),
    "qwen3": Config(
        start=Path("Qwen/Qwen3-Reranker-0.6B"),
        prefix_room=256,
        suffix_room=256,
        optimiser="adamw",
        lr=1e-5,
        weight_decay=0.0,
    ),
}


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
        self._rows = read_rows(path)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
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
        """A right one if there is one, then wrong ones, more of those that rank before others."""
        labels = np.array(row["labels"])
        right = rng.permutation(np.flatnonzero(labels == 1))[:1]
        wrong = np.flatnonzero(labels == 0)
        weights = (1.0 + np.arange(len(wrong))) ** -0.5
        take = min(count - len(right), len(wrong))
        if take == 0:
            return right
        picked = rng.choice(wrong, take, replace=False, p=weights / weights.sum())
        return np.concatenate([right, picked])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
      NotFoundError: there is none.
      InvalidInputError: it is empty, a line is no such row, or no row has a right candidate.
    """
    if not path.is_file():
        raise NotFoundError(
            f"{path} is not there; `python -m training.builtin.rerank_rows --out {path}` writes "
            "rows of the built-in models",
            reason="MISSING_DATA",
            path=path,
        )
    rows = []
    for number, line in enumerate(json_lines(path.read_text("utf-8")), start=1):
        try:
            row = json.loads(line)
            fine = (
                isinstance(row["query"], str)
                and all(isinstance(one, str) for one in row["candidates"])
                and len(row["candidates"]) == len(row["labels"]) > 0
                and set(row["labels"]) <= {0, 1}
            )
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise InvalidInputError(
                f'{path}:{number}: expected {{"query": text, "candidates": [text, …], "labels": '
                "[0 or 1, …]} with a label for each of at least one candidate",
                field="rows",
            )
        rows.append(row)
    if not any(1 in row["labels"] for row in rows):
        raise InvalidInputError(f"{path} has no row with a right candidate", field="rows")
    return rows


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
    head = model.text.head_rows((yes, no))
    return (last @ (head[0] - head[1])).astype(jnp.float32).reshape(lists, count)


def main(config: Config) -> None:
    launch.keep_freed_memory()
    # --- data -------------------------------------------------------------------------------
    base = hub.local(config.start)
    whole = model_config(base).model_type == "qwen3"
    tokenizer = Tokenizer.from_dir(base if whole else config.tokenizer)
    prompts = PromptSet.from_dir(base) if whole else PromptSet("mini", tokenizer)
    yes, no = prompts.yes_id, prompts.no_id
    source = RowSource(config.rows, prompts, config)

    # --- model and optimiser ------------------------------------------------------------------
    if whole:
        model = hf.load(base)
    else:
        model = MultimodalLM(builtin.reranker_config(tokenizer), rngs=nnx.Rngs(config.seed))
        start = hf.load(base).text
        model.text.embed_vd[...] = start.embed_vd[...]
        for name, weight in vars(model.text.layers).items():
            if isinstance(weight, nnx.Param) and hasattr(start.layers, name):
                # Not the norms of queries and keys, which only the reranker has.
                weight[...] = getattr(start.layers, name)[...]
    make = muon if config.optimiser == "muon" else adamw
    tx = make(
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
        answered = jnp.maximum(has.sum(), 1)  # a batch may have no list with a right answer
        listwise = jnp.sum(optax.softmax_cross_entropy(logits, target) * has) / answered
        first = (right[jnp.arange(len(logits)), logits.argmax(1)] * has).sum() / answered
        loss = pointwise + config.listwise * listwise
        return loss, {
            "loss": loss,
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
    checkpoints = RunCheckpoints(config.out / "checkpoints")
    mine = {
        "seed": config.seed,
        "lists": config.lists,
        "candidates": config.candidates,
        "optimiser": config.optimiser,
        "rows": source.fingerprint,
    }
    step = checkpoints.latest() or 0
    if step:
        go_on(mine, checkpoints.position(step), config.out)
        model, opt_state = checkpoints.restore(step, (model, opt_state))
        print(f"resumed at step {step}")

    # --- loop -------------------------------------------------------------------------------
    telemetry = Telemetry(config.out, steps=config.steps, first=step)
    batches = prefetch(source.batches(step))
    since, timed, seen = time.monotonic(), step, []
    with StopRequest() as stop:
        stopped = False
        while step < config.steps and not stopped:
            model, opt_state, metrics = train_step(model, opt_state, next(batches))
            seen.append(metrics)
            step += 1
            stopped = stop.asked()
            telemetry.advance(step)
            if step % config.report_every == 0 or step == config.steps or stopped:
                row = results.averaged(seen)
                seconds = (time.monotonic() - since) / (step - timed)
                row |= {"seconds_per_step": seconds, "examples_per_second": config.lists / seconds}
                telemetry.report(step, row)
                since, timed, seen = time.monotonic(), step, []
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                checkpoints.save(step, (model, opt_state), {**mine, "step": step}, None)
    checkpoints.close()
    telemetry.close()
    if step < config.steps:
        stop.leave()

    # --- export -----------------------------------------------------------------------------
    if whole:
        convert.export_like(model, base, config.out / "export")
    else:
        hf.export(model, config.out / "export")


if __name__ == "__main__":
    sys.exit(configuration.command(main, PRESETS, __doc__))
