"""The reasoner: next-token loss on ECRs behind their prompts.

    python -m training.sft --config builtin --data jsonl:pairs.jsonl

Every query and document of an example that has an ECR is one sequence: the reasoner's prompt, which
carries no loss, and the ECR with its end of turn, which does. The loss is the mean over the learnt
tokens of the whole global batch, summed over sub-batches, so it does not depend on how they were
packed. The vision tower is frozen unless `--tuning.method full --tuning.vision`. The shell (order
of the data, checkpoints, stopping, export) is that of `training.contrastive`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from training import batches, configuration, flops, launch, parameters, results
from training.batches import Fill, Item, Packing, SubBatch
from training.checkpoint import RunCheckpoints, go_on
from training.contrastive import check_sizes, first_of, mixed
from training.data.examples import Example
from training.data.mixture import Mixture
from training.data.order import BatchOrder, read_steps
from training.data.rows import ExampleSource
from training.data.sources import open_source
from training.launch import Job
from training.optimiser import Optimiser
from training.parameters import Tuning
from training.prefetch import prefetch
from training.sequences import Sequences, reasoned, reasoning_items
from training.stopping import StopRequest
from training.telemetry import Telemetry
from tte_jax import sharding
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.errors import InvalidInputError
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.nn.linear import split_like
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.weights import hub, source

LOOKED_AT = 200
"""Examples of a data set in which there must be an ECR, or the run does not begin."""


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      model: Hugging Face directory or hub id.
      data: sources of examples whose sides have ECRs.
      eval: a source; its loss decides which checkpoint is the best. eval_examples: so many of it.
      sides: which documents of an example are learnt.
      steps: of the whole schedule; until: stop after this one, 0 = at the end.
      global_batch: examples of a step, on all devices together; sub_batch: of one data set.
      logit_rows: logits are made for so many tokens of a row at a time; they are the largest array.
      Others as in `training.contrastive`.
    """

    model: str = str(WEIGHTS_DIR / REASONER)
    data: tuple[str, ...] = ()
    eval: str = ""
    eval_examples: int = 128
    out: Path = Path(".data/runs/sft")
    sides: Literal["both", "query", "document"] = "both"
    steps: int = 1000
    until: int = 0
    global_batch: int = 128
    sub_batch: int = 128
    packing: Packing = field(default_factory=Packing)
    tuning: Tuning = field(default_factory=lambda: Tuning(dropout=0.0))
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=2e-5))
    logit_rows: int = 64
    mesh: str = ""
    job: Job = field(default_factory=Job)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    unroll: bool = False
    seed: int = 0
    report_every: int = 10
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    peak_tflops: float = 0.0


_PAPER = Config(
    model="Qwen/Qwen2-VL-2B-Instruct",
    packing=Packing(lengths=(512, 1024, 2048), tokens=8192, slots=8, patches=1024),
    tuning=Tuning(method="full"),
)
PRESETS = {
    "builtin": Config(
        steps=300,
        global_batch=64,
        sub_batch=64,
        packing=Packing(lengths=(64, 128, 256), tokens=2048, slots=4, patches=64),
        tuning=Tuning(method="full"),
        optimiser=Optimiser(lr=2e-4, schedule="cosine", weight_decay=0.05),
        dtype="float32",
        remat=False,
        unroll=True,
    ),
    "paper-2b": _PAPER,
    "paper-7b": replace(_PAPER, model="Qwen/Qwen2-VL-7B-Instruct"),
}


class Read(NamedTuple):
    """A step's sequences of each shard of this process."""

    step: int
    items: list[list[Item]]


def next_token_loss(
    model: MultimodalLM, batch: SubBatch, *, remat: bool, unroll: bool = False, rows: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed loss, how many of the learnt tokens are the most likely one), float32."""
    hidden = batches.states(model, batch, remat=remat, unroll=unroll)
    length = hidden.shape[1]
    size = rows if length % rows == 0 else length

    def block(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, targets, weights = part
        logits = model.logits(h)
        # The target's logit by comparison: where the vocabulary is split, so is this.
        number = split_like(jnp.arange(logits.shape[-1]), logits)
        mine = jnp.sum(jnp.where(targets[..., None] == number, logits, 0), axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - mine
        return jnp.sum(nll * weights), jnp.sum((mine >= logits.max(-1)) * weights)

    total = jnp.zeros(()), jnp.zeros(())
    for at in range(0, length, size):  # few, and each with its own slice: no reshape of split rows
        part = tuple(x[:, at : at + size] for x in (hidden, batch.targets, batch.learnt))
        more = jax.checkpoint(block)(part)  # pyright: ignore[reportArgumentType]
        total = total[0] + more[0], total[1] + more[1]
    return total


def main(config: Config) -> Path | None:
    """Runs it; the exported directory, or None when it stopped before the end."""
    # --- mesh -------------------------------------------------------------------------------
    launch.initialise(config.job)
    launch.keep_freed_memory()
    chief, devices = jax.process_index() == 0, jax.device_count()
    sizes = sharding.parse_mesh(config.mesh or f"data={devices}")
    mesh = batches.mesh_of(sizes) if devices > 1 else None
    shards, total = batches.local_shards(mesh), sizes["data"] * sizes["fsdp"]
    check_sizes(
        total,
        shards,
        global_batch=config.global_batch,
        steps=config.steps,
        until=config.until,
    )

    # --- data -------------------------------------------------------------------------------
    mixture = mixed(config.data)
    for part in mixture.parts:
        something_to_learn(part.source, config.sides, part.name)
    order = BatchOrder(
        mixture, global_batch=config.global_batch, sub_batch=config.sub_batch, seed=config.seed
    )
    directory = hub.local(config.model)

    # --- model and shapes -------------------------------------------------------------------
    placed = None if mesh is None else sharding.sharding_of(mesh)
    model = source.load(directory, dtype=jnp.dtype(config.dtype), sharding_of=placed)
    parts, trained, frozen = parameters.split(model, config.tuning, key=jax.random.key(config.seed))
    del model
    sequences = Sequences(
        PromptSet.from_dir(directory), parts.config, longest=max(config.packing.lengths)
    )
    costs, peak = flops.costs(parts.config), flops.peak_flops(config.peak_tflops)

    # --- shard ------------------------------------------------------------------------------
    tx = config.optimiser.make(config.steps)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        opt_state = parameters.on_mesh(tx.init(trained), mesh)

    # --- step -------------------------------------------------------------------------------
    def loss_of(trained: Any, frozen: Any, batch: SubBatch, key: Any) -> Any:
        model = parts.assemble(trained, frozen, key)
        how = {"remat": config.remat, "unroll": config.unroll}
        return next_token_loss(model, batch, **how, rows=config.logit_rows)

    @jax.jit(donate_argnums=(4,))
    def accumulate(trained: Any, frozen: Any, batch: SubBatch, key: Any, grads: Any) -> Any:
        found, more = jax.value_and_grad(loss_of, has_aux=True)(trained, frozen, batch, key)
        return jax.tree.map(jnp.add, grads, more), found

    @jax.jit(donate_argnums=(0, 1))
    def update(trained: Any, opt_state: Any, grads: Any, tokens: Array) -> Any:
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, optax.tree.norm(grads)

    just_loss = jax.jit(loss_of)

    def on_devices(items: list[list[Item]]) -> tuple[list[SubBatch], float, Fill]:
        made, fill = batches.pack(
            items, config.packing, parts.config, nowhere=0, text=True, agree=batches.agreed
        )
        mine = sum(float(i.learnt.sum()) for part in items for i in part if i.learnt is not None)
        learnt = batches.summed(np.array([mine]), share=len(shards) / total)
        return [batches.place(one, mesh, parts.config, shards) for one in made], learnt, fill

    def train_step(trained: Any, opt_state: Any, read: Read) -> Any:
        on, tokens, fill = on_devices(read.items)
        if not tokens:  # a part of the data with few ECRs
            nothing = {"loss": 0.0, "right": 0.0, "grad_norm": 0.0, "tokens": 0.0}
            return trained, opt_state, nothing, fill
        key = jax.random.fold_in(jax.random.key(config.seed + 1), read.step)
        grads, found = jax.tree.map(jnp.zeros_like, trained), []
        for i, batch in enumerate(on):
            grads, both = accumulate(trained, frozen, batch, jax.random.fold_in(key, i), grads)
            found.append(both)
        weight = np.float32(tokens)
        trained, opt_state, norm = update(trained, opt_state, grads, weight)
        loss, right = (sum(x) / weight for x in zip(*found, strict=True))
        metrics = {"loss": loss, "right": right, "grad_norm": norm, "tokens": tokens}
        return trained, opt_state, metrics, fill

    # --- restore ----------------------------------------------------------------------------
    kept = RunCheckpoints(
        config.out / "checkpoints",
        last=config.keep_last,
        best=config.keep_best,
        metric="loss" if config.eval else "",
        lower=True,
    )
    mine = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "sub_batch": config.sub_batch,
        "examples": len(mixture),
    }
    step = kept.latest() or 0
    if step:
        go_on(mine, kept.position(step), config.out)
        state = kept.restore(step, {"trained": trained, "optimiser": opt_state})
        trained, opt_state = state["trained"], state["optimiser"]
    if chief:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.json").write_text(json.dumps(asdict(config), default=str, indent=2))

    # --- evals ------------------------------------------------------------------------------
    pool = ThreadPoolExecutor(4, thread_name_prefix="sequences")
    asked = [] if not config.eval else first_of(open_source(config.eval), config.eval_examples)
    if asked:
        something_to_learn(asked, config.sides, config.eval)

    def evaluate(trained: Any) -> dict[str, float]:
        """Loss per learnt token, and share of them that are the most likely one."""
        rows = -(-len(asked) // total)
        here = [asked[n * rows : (n + 1) * rows] for n in shards]
        items = [reasoning_items(part, config.sides, sequences, pool) for part in here]
        on, tokens, _ = on_devices(items)
        found = [just_loss(trained, frozen, batch, None) for batch in on]
        loss, right = (float(sum(x)) / tokens for x in zip(*found, strict=True))
        return {"loss": loss, "right": right}

    # --- loop -------------------------------------------------------------------------------
    last = min(config.until or config.steps, config.steps)
    telemetry = Telemetry(config.out, steps=config.steps, first=step, writes=chief)
    reads = prefetch(read_ahead(config, mixture, order, sequences, pool, step, shards, total))
    since, timed, seen = time.monotonic(), step, []
    with StopRequest() as stop, nullcontext() if mesh is None else jax.set_mesh(mesh):
        stopped = False
        while step < last and not stopped:
            trained, opt_state, metrics, fill = train_step(trained, opt_state, next(reads))
            seen.append((metrics, fill))
            step += 1
            stopped = stop.asked()
            due = step % config.checkpoint_every == 0 or step == last
            telemetry.advance(step)
            if step % config.report_every == 0 or due or stopped:
                row = results.averaged([m for m, _ in seen])
                predicted = row["tokens"] * len(seen) * len(shards) / total
                row |= results.speed(
                    [f for _, f in seen],
                    costs,
                    seconds=time.monotonic() - since,
                    examples=(step - timed) * config.global_batch,
                    share=len(shards) / total,
                    tuning=config.tuning,
                    peak=peak,
                    predicted=int(predicted),
                )
                scores = evaluate(trained) if due and asked else {}
                telemetry.report(step, {**row, **{f"eval/{k}": v for k, v in scores.items()}})
                if due or stopped:
                    state = {"trained": trained, "optimiser": opt_state}
                    kept.save(step, state, {**mine, "step": step}, scores or None)
                since, timed, seen = time.monotonic(), step, []
        kept.wait()

        values = None
        if step == config.steps:
            best = kept.best()
            if best is not None and best != step:
                trained = kept.restore(best, {"trained": trained, "optimiser": opt_state})[
                    "trained"
                ]
            values = results.gathered(parts, trained, frozen, mesh)
    kept.close()
    telemetry.close()
    pool.shutdown()

    # --- export -----------------------------------------------------------------------------
    return None if values is None else results.export(parts, values, directory, config.out)


def something_to_learn(source: ExampleSource | Sequence[Example], sides: str, name: str) -> None:
    """Raises InvalidInputError when none of the first `LOOKED_AT` examples has an ECR to learn."""
    count = min(len(source), LOOKED_AT)
    if not any(reasoned(source[i], sides) for i in range(count)):
        where = {"both": "", "query": " for its query", "document": " for a positive"}[sides]
        raise InvalidInputError(
            f"none of the first {count} examples of {name} has an ECR{where}, and nothing else is"
            " learnt here. `python -m training.reason` writes them, and KIND:PATH?ecrs=FILE reads"
            " them.",
            field="data",
        )


def read_ahead(
    config: Config,
    mixture: Mixture,
    order: BatchOrder,
    sequences: Sequences,
    pool: ThreadPoolExecutor,
    first: int,
    shards: Sequence[int],
    total: int,
) -> Iterator[Read]:
    """Steps from `first` on, tokenised, in the order of (seed, step)."""
    host, hosts = shards[0] // len(shards), total // len(shards)
    examples: list[Example]
    for step, examples in read_steps(mixture, order, step=first, host=host, hosts=hosts, threads=2):
        if step >= config.steps:
            return
        rows = len(examples) // len(shards)
        here = [examples[n * rows : (n + 1) * rows] for n in range(len(shards))]
        yield Read(step, [reasoning_items(part, config.sides, sequences, pool) for part in here])


if __name__ == "__main__":
    sys.exit(configuration.command(main, PRESETS, __doc__))
