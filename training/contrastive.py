"""The embedder: contrastive training of any supported Hugging Face directory.

    python -m training.contrastive --config builtin --data jsonl:pairs.jsonl
    python -m training.contrastive --config paper-7b --model 7B --mesh data=8,fsdp=8 --dry-run

Query to document with global in-batch negatives and each query's own mined ones
(`training.contrastive_loss`), in the memory of one sub-batch (`training.gradcache`), with adapters
or in full (`training.parameters`). Everything that decides a step is a function of (seed, step): a
run that was stopped, or killed, goes on from its newest checkpoint to the same bits on the same
mesh. Ends with a directory that `tte serve` reads. `docs/training.md` has the options.
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

from training import batches, configuration, flops, launch, parameters, results
from training.batches import Fill, Item, Packing, SubBatch
from training.checkpoint import RunCheckpoints, go_on
from training.contrastive_loss import BATCH_AXES, Embeddings, Labels, Rules, contrastive
from training.data.examples import Example
from training.data.mixture import Mixture, by_dataset
from training.data.order import BatchOrder, read_steps
from training.data.rows import ExampleSource
from training.data.sources import mined_round, open_source
from training.gradcache import GradCache
from training.launch import Job
from training.optimiser import Optimiser
from training.parameters import Tuning
from training.prefetch import prefetch
from training.sequences import Counts, Sequences, embedding_items, labels_of, without_ecr
from training.stopping import StopRequest
from training.telemetry import Telemetry
from tte_jax import sharding
from tte_jax.builtin.models import REASONER, WEIGHTS_DIR
from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.prompts import EmbedMode, PromptSet
from tte_jax.weights import hub
from tte_jax.weights import source as weights

LEAST_TEMPERATURE = 0.01
"""A learnt one stays above it, as CLIP's does (arXiv 2103.00020)."""


@dataclass(frozen=True)
class Config:
    """Options of a run.

    Attributes:
      model: Hugging Face directory or hub id; for a dry run also 2B, 7B or 72B (Qwen2-VL).
      data: sources of examples (`training.data.sources`), as one mixture.
      eval: a source; how often the right document of its pool comes first decides which checkpoint
        is the best. "" = none, and the newest is exported.
      eval_examples: so many of its first examples are asked.
      out: folder of the run: checkpoints, metrics, adapter, export.
      steps: of the whole schedule; until: stop after this one, 0 = at the end.
      global_batch: queries of a step, on all devices together; sub_batch: of one data set.
      counts: documents of a query.
      temperature: τ, or where it starts when it is learnt; 0.01 at least.
      ecr_mode: which part of an ECR is read; no_ecr: share of queries and documents that are shown
        without theirs, so that embedding without reasoning is trained as well.
      grad_cache: off = one program for the whole step, faster where it fits.
      mesh: sizes of data, fsdp and tp; "" = all devices on data.
      dtype: in which the model computes; what is trained is float32 always.
      remat: layers are computed again in the backward pass instead of being kept.
      unroll: every layer is compiled by itself; faster on a CPU, and longer to compile.
      checkpoint_every: steps; evaluation comes with it.
      peak_tflops: of one device, for MFU; 0 = by its kind.
      dry_run: print shapes, shardings, bytes and FLOPs per device, and stop.
    """

    model: str = str(WEIGHTS_DIR / REASONER)
    data: tuple[str, ...] = ()
    eval: str = ""
    eval_examples: int = 256
    out: Path = Path(".data/runs/contrastive")
    steps: int = 625
    until: int = 0
    global_batch: int = 8192
    sub_batch: int = 512
    counts: Counts = field(default_factory=Counts)
    packing: Packing = field(default_factory=Packing)
    tuning: Tuning = field(default_factory=Tuning)
    optimiser: Optimiser = field(default_factory=Optimiser)
    rules: Rules = field(default_factory=Rules)
    temperature: float = 0.02
    learn_temperature: bool = False
    ecr_mode: EmbedMode = EmbedMode.WHOLE
    no_ecr: float = 0.0
    grad_cache: bool = True
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
    dry_run: bool = False


_PAPER = Config(
    model="Qwen/Qwen2-VL-2B-Instruct",
    counts=Counts(positives=1, negatives=7),
    packing=Packing(lengths=(256, 512, 1024, 2048), tokens=8192, slots=8, patches=1024),
    rules=Rules(margin=0.1, rows=256),
)
PRESETS = {
    "builtin": Config(
        steps=300,
        global_batch=64,
        sub_batch=64,
        counts=Counts(positives=1, negatives=0),
        packing=Packing(lengths=(64, 128, 256), tokens=2048, slots=4, patches=64),
        tuning=Tuning(method="full"),
        optimiser=Optimiser(lr=2e-4, schedule="cosine", weight_decay=0.05),
        temperature=0.05,
        learn_temperature=True,
        no_ecr=0.5,
        grad_cache=False,
        dtype="float32",
        remat=False,
        unroll=True,
    ),
    "paper-2b": _PAPER,
    "paper-7b": replace(
        _PAPER,
        model="Qwen/Qwen2-VL-7B-Instruct",
        packing=replace(_PAPER.packing, tokens=4096),
    ),
}


class Read(NamedTuple):
    """A step's examples, tokenised: the sequences and labels of each shard of this process."""

    step: int
    items: list[list[Item]]
    labels: list[Labels]


def embeddings(buffer: jax.Array, counts: Counts, mesh: Any) -> Embeddings:
    """Vectors of all shards, [shards * b * (1 + P + K), D], by what they are."""

    def split(part: jax.Array) -> Embeddings:
        b, size = part.shape[0] // counts.vectors, part.shape[1]
        first = b * (1 + counts.positives)
        return Embeddings(
            queries=part[:b],
            positives=part[b:first].reshape(b, counts.positives, size),
            negatives=part[first:].reshape(b, counts.negatives, size),
        )

    if mesh is None:
        return split(buffer)
    spec = jax.sharding.PartitionSpec(BATCH_AXES)
    return jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec)(buffer)


def programs(config: Config, parts: parameters.Split, mesh: Any) -> GradCache:
    """The step's device programs; `trained` is {"model": …, "log_scale": …}."""

    def encode(trained: Any, frozen: Any, batch: SubBatch, key: Any) -> jax.Array:
        model = parts.assemble(trained["model"], frozen, key)
        return batches.encode(model, batch, remat=config.remat, unroll=config.unroll)

    def loss(buffer: jax.Array, trained: Any, labels: Labels) -> Any:
        log_scale = trained["log_scale"]
        if not config.learn_temperature:
            log_scale = jax.lax.stop_gradient(log_scale)
        scale = jnp.exp(log_scale)
        z = embeddings(buffer, config.counts, mesh)
        value, metrics = contrastive(z, labels, scale, config.rules, mesh)
        return value, {**metrics, "temperature": 1 / scale}

    return GradCache(encode, loss, mesh)


def main(config: Config, *, examples: ExampleSource | None = None, mined: str = "") -> Path | None:
    """Runs it; the exported directory, or None when it stopped before the end.

    Args:
      examples: the examples of `config.data`, index by index, with mined negatives put in
        (`training.mining.mined_source`); None = as they are.
      mined: name of the sealed round that those are from; "" = the rounds that `config.data` names.
        Checkpoints hold it with the number of steps that were trained on it, and a run may go on
        with another round.
    """
    if config.dry_run:
        from training import dry_run

        dry_run.show(config)
        return None
    # --- mesh -------------------------------------------------------------------------------
    launch.initialise(config.job)
    launch.keep_freed_memory()
    chief, devices = jax.process_index() == 0, jax.device_count()
    sizes = sharding.parse_mesh(config.mesh or f"data={devices}")
    mesh = batches.mesh_of(sizes) if devices > 1 else None
    shards = batches.local_shards(mesh)
    total = sizes["data"] * sizes["fsdp"]
    check(config, total, shards)

    # --- data -------------------------------------------------------------------------------
    mixture = mixed(config.data)
    mined = mined or ",".join(filter(None, map(mined_round, config.data)))
    order = BatchOrder(
        mixture, global_batch=config.global_batch, sub_batch=config.sub_batch, seed=config.seed
    )
    directory = hub.local(config.model)
    prompts = PromptSet.from_dir(directory)

    # --- model and shapes -------------------------------------------------------------------
    placed = None if mesh is None else sharding.sharding_of(mesh)
    model = weights.load(directory, dtype=jnp.dtype(config.dtype), sharding_of=placed)
    parts, trained, frozen = parameters.split(model, config.tuning, key=jax.random.key(config.seed))
    del model
    sequences = Sequences(
        prompts, parts.config, longest=max(config.packing.lengths), mode=config.ecr_mode
    )
    each = config.global_batch // total
    vectors, size = config.global_batch * config.counts.vectors, parts.config.text.hidden_size
    costs = flops.costs(parts.config)
    peak = flops.peak_flops(config.peak_tflops)

    # --- shard ------------------------------------------------------------------------------
    log_scale = jnp.log(jnp.float32(1 / config.temperature))
    trained = parameters.on_mesh({"model": trained, "log_scale": log_scale}, mesh)
    tx = config.optimiser.make(config.steps)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        opt_state = parameters.on_mesh(tx.init(trained), mesh)

    # --- step -------------------------------------------------------------------------------
    step_programs = programs(config, parts, mesh)

    @jax.jit(donate_argnums=(0, 1))
    def update(trained: Any, opt_state: Any, grads: Any) -> tuple[Any, Any, jax.Array]:
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        # Here and not in the loss, whose gradient would end at the bound.
        trained["log_scale"] = jnp.minimum(trained["log_scale"], np.log(1 / LEAST_TEMPERATURE))
        return trained, opt_state, norm

    def on_devices(read: Read, counts: Counts) -> tuple[list[SubBatch], Any, Fill]:
        made, fill = batches.pack(
            read.items,
            config.packing,
            parts.config,
            nowhere=each * counts.vectors,
            agree=batches.agreed,
        )
        on = [batches.place(one, mesh, parts.config, shards) for one in made]
        labels = jax.tree.map(lambda *x: batches.spread(x, mesh, shards), *read.labels)
        return on, labels, fill

    def train_step(trained: Any, opt_state: Any, read: Read) -> tuple[Any, Any, Any, Fill]:
        on, labels, fill = on_devices(read, config.counts)
        key = jax.random.fold_in(jax.random.key(config.seed + 1), read.step)
        keys = [jax.random.fold_in(key, i) for i in range(len(on))]
        run = step_programs if config.grad_cache else step_programs.direct
        (loss, metrics), grads = run(trained, frozen, on, keys, labels, rows=vectors, size=size)
        trained, opt_state, norm = update(trained, opt_state, grads)
        return trained, opt_state, {"loss": loss, "grad_norm": norm, **metrics}, fill

    # --- restore ----------------------------------------------------------------------------
    kept = RunCheckpoints(
        config.out / "checkpoints",
        last=config.keep_last,
        best=config.keep_best,
        metric="hit1" if config.eval else "",
    )
    mine = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "sub_batch": config.sub_batch,
        "examples": len(mixture),
    }
    step = begun = kept.latest() or 0
    state = {"trained": trained, "optimiser": opt_state}
    if step:
        found = kept.position(step)
        go_on(mine, found, config.out)
        state = kept.restore(step, state)
        if found["round"] == mined:
            begun = step - found["round_offset"]
    trained, opt_state = state.pop("trained"), state.pop("optimiser")
    if chief:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.json").write_text(json.dumps(asdict(config), default=str, indent=2))

    # --- evals ------------------------------------------------------------------------------
    pool = ThreadPoolExecutor(4, thread_name_prefix="sequences")
    asked = [] if not config.eval else first_of(open_source(config.eval), config.eval_examples)

    def evaluate(trained: Any) -> dict[str, float]:
        """hit@1, hit@10 and mean reciprocal rank in the pool of the examples' own documents."""
        counts, found = Counts(1, 0), []
        batch = config.global_batch
        for at in range(0, len(asked), batch):
            rows = [asked[i % len(asked)] for i in range(at, at + batch)]
            here = [rows[n * each : (n + 1) * each] for n in shards]
            items = [embedding_items(part, counts, sequences, pool) for part in here]
            read = Read(0, items, [labels_of(part, counts) for part in here])
            buffer = step_programs.empty(batch * counts.vectors, size)
            for one in on_devices(read, counts)[0]:
                buffer = step_programs.forward(trained, frozen, one, None, buffer)
            pairs = results.whole(buffer, mesh).reshape(total, counts.vectors, each, size)
            found.append(pairs.transpose(1, 0, 2, 3).reshape(2, batch, size))
        vectors = np.concatenate(found, axis=1)[:, : len(asked)]
        return results.retrieval(vectors[0], vectors[1], [e.positives[0].key for e in asked])

    # --- loop -------------------------------------------------------------------------------
    last = min(config.until or config.steps, config.steps)
    telemetry = Telemetry(config.out, steps=config.steps, first=step, writes=chief)
    reads = prefetch(
        read_ahead(config, examples or mixture, order, sequences, pool, step, shards, total)
    )
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
                seconds = time.monotonic() - since
                row |= results.speed(
                    [f for _, f in seen],
                    costs,
                    seconds=seconds,
                    examples=(step - timed) * config.global_batch,
                    share=len(shards) / total,
                    tuning=config.tuning,
                    peak=peak,
                )
                scores = evaluate(trained) if due and asked else {}
                telemetry.report(step, {**row, **{f"eval/{k}": v for k, v in scores.items()}})
                if due or stopped:
                    position = {**mine, "step": step, "round": mined}
                    position["round_offset"] = step - begun
                    state = {"trained": trained, "optimiser": opt_state}
                    kept.save(step, state, position, scores or None)
                since, timed, seen = time.monotonic(), step, []
        kept.wait()

        values = None
        if step == config.steps:
            best = kept.best()
            if best is not None and best != step:
                state = {"trained": trained, "optimiser": opt_state}
                trained = kept.restore(best, state)["trained"]
            values = results.gathered(parts, trained["model"], frozen, mesh)
    kept.close()
    telemetry.close()
    pool.shutdown()

    # --- export -----------------------------------------------------------------------------
    return None if values is None else results.export(parts, values, directory, config.out)


def read_ahead(
    config: Config,
    source: Any,
    order: BatchOrder,
    sequences: Sequences,
    pool: ThreadPoolExecutor,
    first: int,
    shards: Sequence[int],
    total: int,
) -> Iterator[Read]:
    """Steps from `first` on, tokenised, in the order of (seed, step)."""
    # Processes that hold the same shards (a tp that spans them) read the same examples.
    host, hosts = shards[0] // len(shards), total // len(shards)
    for step, examples in read_steps(source, order, step=first, host=host, hosts=hosts, threads=2):
        if step >= config.steps:
            return
        rows = len(examples) // len(shards)
        first_row = shards[0] * rows
        if config.no_ecr:
            examples = [
                without_ecr(e, config.no_ecr, (config.seed, step, first_row + i))
                for i, e in enumerate(examples)
            ]
        here = [examples[n * rows : (n + 1) * rows] for n in range(len(shards))]
        yield Read(
            step,
            [embedding_items(part, config.counts, sequences, pool) for part in here],
            [labels_of(part, config.counts) for part in here],
        )


def mixed(specs: Sequence[str]) -> Mixture:
    """All sources as one mixture, by data set.

    Raises InvalidInputError when there are none.
    """
    if not specs:
        raise InvalidInputError(
            "no data; give --data KIND:PATH, such as jsonl:pairs.jsonl", field="data"
        )
    return Mixture([part for spec in specs for part in by_dataset(open_source(spec)).parts])


def first_of(examples: Any, count: int) -> list[Example]:
    return [examples[i] for i in range(min(count, len(examples)))]


def check(config: Config, total: int, shards: Sequence[int]) -> None:
    """As `check_sizes`; raises InvalidInputError for a temperature, too."""
    sizes = {"global_batch": config.global_batch, "steps": config.steps, "until": config.until}
    check_sizes(total, shards, **sizes)
    if not LEAST_TEMPERATURE <= config.temperature <= 1:
        raise InvalidInputError(
            f"temperature {config.temperature}: expected {LEAST_TEMPERATURE} to 1",
            field="temperature",
        )


def check_sizes(
    total: int, shards: Sequence[int], *, global_batch: int, steps: int, until: int
) -> None:
    """Raises InvalidInputError where sizes do not fit each other.

    Args:
      total: shards of a step; shards: those of this process.
    """
    if global_batch % total:
        raise InvalidInputError(
            f"global_batch {global_batch} is not a multiple of data * fsdp = {total}",
            field="global_batch",
        )
    if list(shards) != list(range(shards[0], shards[0] + len(shards))) or total % len(shards):
        raise InvalidInputError(
            f"this process holds the shards {list(shards)} of {total}, which are no range of equal"
            " size for every process; choose data * fsdp so that they are: a multiple or a divisor"
            " of the number of processes",
            field="mesh",
        )
    if until > steps or steps < 1:
        raise InvalidInputError(f"until {until} is beyond steps {steps}", field="until")


if __name__ == "__main__":
    sys.exit(configuration.command(main, PRESETS, __doc__))
