"""Steps of contrastive training against a PyTorch loop of the same model, weights and batch.

    python -m benchmarks.training

A random Qwen3, full fine-tuning in float32 with AdamW, InfoNCE over the batch's pairs. The loop is
what trainers in PyTorch do: transformers' own model (sdpa attention), rows padded to the longest of
their side, one backward pass. Ours runs as the trainer does: the same sequences packed in rows,
and once more with every sequence in a row of its own, so that packing and the rest can be told
apart. Both first compute the loss of the same weights, which must agree. Then they take turns, and
the ratio is of medians within this one run; PyTorch is not a dependency of ours, but of the tests.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import environment
from training import batches, contrastive, parameters
from training.batches import Item, Packing
from training.contrastive_loss import Labels, Rules
from training.launch import keep_freed_memory, without_avx512
from training.optimiser import Optimiser
from training.parameters import Tuning
from training.sequences import Counts
from tte_jax.engine.inputs import ModelInput
from tte_jax.preprocess.positions import text_positions
from tte_jax.weights import hf

SCALE = 50.0  # 1 / 0.02


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      hidden, layers, heads, vocabulary: of the model; its MLP is three times as wide.
      pairs: queries with a document each.
      tokens, longest: sequences are log-normal around the one, and at most the other.
      rounds: of turns, after one that is not counted.
      grad_cache: the sub-batched path instead of one program.
    """

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    vocabulary: int = 8192
    pairs: int = 32
    tokens: int = 48
    longest: int = 128
    rounds: int = 5
    grad_cache: bool = False
    seed: int = 0
    out: Path = Path("benchmarks/results/training.json")


def sequences(options: Options) -> list[np.ndarray]:
    """Queries, then documents: token ids of unequal lengths."""
    rng = np.random.default_rng(options.seed)
    drawn = rng.lognormal(np.log(options.tokens), 0.5, 2 * options.pairs)
    lengths = np.clip(drawn.astype(int), 4, options.longest)
    return [rng.integers(2, options.vocabulary, n).astype(np.int32) for n in lengths]


def torch_step(
    directory: Path, rows: list[np.ndarray], lr: float
) -> Callable[[], tuple[float, float]]:
    """A step of the loop: (loss before the update, seconds)."""
    import torch
    from transformers import Qwen3Model

    model = Qwen3Model.from_pretrained(directory, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    pairs = len(rows) // 2

    def padded(part: list[np.ndarray]) -> tuple[Any, Any]:
        ids = np.zeros((len(part), max(map(len, part))), np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    sides = [padded(rows[:pairs]), padded(rows[pairs:])]

    def step() -> tuple[float, float]:
        begun = time.perf_counter()
        z = []
        for ids, mask in sides:
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
            z.append(torch.nn.functional.normalize(last, dim=-1))
        logits = SCALE * z[0] @ z[1].T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(pairs))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return float(loss.detach()), time.perf_counter() - begun

    return step


def our_step(
    directory: Path, rows: list[np.ndarray], options: Options, packing: Packing, lr: float
) -> tuple[Callable[[], tuple[float, float]], float]:
    """(a step of ours, likewise; its share of padding)."""
    import optax

    pairs = len(rows) // 2
    config = contrastive.Config(
        tuning=Tuning("full"),
        counts=Counts(1, 0),
        rules=Rules(),
        temperature=1 / SCALE,
        dtype="float32",
        remat=False,
        unroll=True,
        optimiser=Optimiser(lr=lr, warmup=0.0),
    )
    parts, trained, frozen = parameters.split(
        hf.load(directory), config.tuning, key=jax.random.key(0)
    )
    cache = contrastive.programs(config, parts, None)
    tx = config.optimiser.make(10**6)
    # No warm-up: PyTorch's has none, and the first step must be the same step.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, b2=0.98, weight_decay=0.0))
    wanted = {"model": trained, "log_scale": jnp.log(jnp.float32(SCALE))}
    state = {"trained": wanted, "optimiser": tx.init(wanted)}
    items = [
        Item(ModelInput(ids, text_positions(len(ids)), len(ids), (), np.zeros(len(ids), bool)), i)
        for i, ids in enumerate(rows)
    ]
    key = np.arange(1, pairs + 1, dtype=np.uint32)
    labels = Labels(
        weight=np.ones(pairs, np.float32),
        group=np.zeros((pairs, 2), np.uint32),
        positive_key=np.stack([key, key], 1)[:, None],
        positive_mask=np.ones((pairs, 1), bool),
        negative_key=np.zeros((pairs, 0, 2), np.uint32),
        negative_mask=np.zeros((pairs, 0), bool),
        positive_score=np.full(pairs, np.nan, np.float32),
        negative_score=np.zeros((pairs, 0), np.float32),
    )

    @jax.jit(donate_argnums=(0, 1))
    def update(trained: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    fills: list[float] = []

    def step() -> tuple[float, float]:
        begun = time.perf_counter()
        made, fill = batches.pack([items], packing, parts.config, nowhere=len(items))
        on = [batches.place(one, None, parts.config) for one in made]
        run = cache if options.grad_cache else cache.direct
        (loss, _), grads = run(
            state["trained"], frozen, on, [None] * len(on), labels,
            rows=len(items), size=options.hidden,
        )  # fmt: skip
        both = update(state["trained"], state["optimiser"], grads)
        state["trained"], state["optimiser"] = jax.block_until_ready(both)
        fills[:] = [fill.pad_share]
        return float(loss), time.perf_counter() - begun

    first, _ = step()
    _reset(state, parts, directory, tx)
    assert np.isfinite(first)
    return step, fills[0]


def _reset(state: dict[str, Any], parts: parameters.Split, directory: Path, tx: Any) -> None:
    """Back to the directory's weights after the step that compiled."""
    _, trained, _ = parameters.split(hf.load(directory), parts.tuning, key=jax.random.key(0))
    state["trained"] = {"model": trained, "log_scale": jnp.log(jnp.float32(SCALE))}
    state["optimiser"] = tx.init(state["trained"])


def main(options: Options) -> int:
    without_avx512(os.environ)
    keep_freed_memory()  # PyTorch gets its memory from the same place
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rows, lr = sequences(options), 1e-4
    loads = [environment.foreign_load()]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(options.seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=options.vocabulary,
                hidden_size=options.hidden,
                intermediate_size=3 * options.hidden,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=max(1, options.heads // 2),
                head_dim=options.hidden // options.heads,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                eos_token_id=1,
            )
        )
        numbers = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder)
        del model
        total = -(-sum(map(len, rows)) // options.longest) + 4
        packed = Packing(
            lengths=(options.longest,), tokens=options.longest * total, slots=16, patches=16
        )
        lone = replace(packed, tokens=options.longest * len(rows), slots=1)
        steps, pads = {}, {}
        for name, packing in (("packed", packed), ("padded", lone)):
            steps[name], pads[name] = our_step(Path(folder), rows, options, packing, lr)
        steps["torch"] = torch_step(Path(folder), rows, lr)
        losses: dict[str, list[float]] = {name: [] for name in steps}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds + 1):
            for name, step in steps.items():
                loss, took = step()
                losses[name].append(loss)
                seconds[name].append(took)
    loads.append(environment.foreign_load())
    apart = max(abs(losses[n][0] - losses["torch"][0]) for n in ("packed", "padded"))
    if apart > 1e-3:
        print(f"the losses of the same weights differ by {apart}: {losses}", file=sys.stderr)
        return 1
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    widths = [max(map(len, rows[: options.pairs])), max(map(len, rows[options.pairs :]))]
    real = sum(map(len, rows))
    result = {
        **environment.describe("benchmarks.training"),
        "foreign_load": loads,
        "noisy": environment.noisy(*loads),
        "torch": torch.__version__,
        "parameters": numbers,
        "pairs": options.pairs,
        "tokens": real,
        "pad_share": {**pads, "torch": 1 - real / (options.pairs * sum(widths))},
        "first_losses": {name: values[0] for name, values in losses.items()},
        "last_losses": {name: values[-1] for name, values in losses.items()},
        "seconds_per_step": medians,
        "examples_per_second": {n: options.pairs / s for n, s in medians.items()},
        "ratio": {n: medians["torch"] / medians[n] for n in ("packed", "padded")},
        "rounds": seconds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
