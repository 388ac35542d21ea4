"""GradCache of the built-in model: are its gradients the direct ones, and is its memory flat?

    python -m benchmarks.gradcache

The trainer's own programs (`training.contrastive.programs`) over the shipped embedder in float32.
Gradients: random packed sequences with and without images, mined negatives, a learnt temperature;
adapters with dropout, and full tuning. Memory: what XLA says that each compiled program holds
beside its arguments and results, for growing global batches. Neither depends on how busy the
machine is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import environment
from training import batches, contrastive, parameters
from training.batches import Item, Packing, SubBatch
from training.contrastive_loss import Labels, Rules
from training.gradcache import GradCache
from training.launch import without_avx512
from training.parameters import Split, Tuning
from training.sequences import Counts
from tte_jax.builtin import models
from tte_jax.engine.inputs import ImageInput, ModelInput, model_input
from tte_jax.errors import InternalError
from tte_jax.models.config import ModelConfig
from tte_jax.preprocess.template import Prompt
from tte_jax.weights import hf

TUNINGS = {
    "LoRA, dropout 0.1": Tuning("lora", dropout=0.1),
    "full, tower too": Tuning("full", vision=True),
}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a built-in name or a model directory.
      queries, negatives: of the batch whose gradients are compared; each query has one positive.
      tokens: of a sub-batch, in rows of 64.
      batches: global batches whose memory is read, one positive a query.
      direct: those of them that are compiled as one program as well.
      rows: queries whose logits the loss holds at a time.
    """

    model: str = models.EMBEDDER
    queries: int = 8
    negatives: int = 2
    tokens: int = 512
    batches: tuple[int, ...] = (64, 512, 4096)
    direct: tuple[int, ...] = (64, 512)
    rows: int = 64
    seed: int = 0
    out: Path = Path("benchmarks/results/gradcache.json")

    @property
    def packing(self) -> Packing:
        return Packing(lengths=(32, 64), tokens=self.tokens, slots=4, patches=64)


def inputs(config: ModelConfig, count: int, rng: np.random.Generator) -> list[ModelInput]:
    """Sequences of 8 to 48 tokens; every other one has a picture of 4 by 4 patches."""
    made = []
    for number in range(count):
        ids = rng.integers(20, 4000, rng.integers(8, 41)).tolist()
        images: list[ImageInput] = []
        if config.vision is not None and number % 2 == 0:
            patches = rng.standard_normal((16, config.vision.patch_values)).astype(np.float32)
            images = [ImageInput(str(number), patches, (1, 4, 4))]
            pads = [config.image_token_id] * (16 // config.vision.merged)
            ids = [config.vision_start_token_id, *pads, *ids]
        prompt = Prompt(
            np.array(ids, np.int32),
            tuple((i.patches, i.grid) for i in images),
            tuple(i.key for i in images),
            tuple(0.0 for _ in images),
        )
        made.append(model_input(prompt, config))
    return made


def labels(queries: int, negatives: int) -> Labels:
    """All documents different, no scores."""
    key = np.arange(1, queries * (1 + negatives) + 1, dtype=np.uint32)
    keys = np.stack([key, key], 1).reshape(queries, 1 + negatives, 2)
    return Labels(
        weight=np.ones(queries, np.float32),
        group=np.zeros((queries, 2), np.uint32),
        positive_key=keys[:, :1],
        positive_mask=np.ones((queries, 1), bool),
        negative_key=keys[:, 1:],
        negative_mask=np.ones((queries, negatives), bool),
        positive_score=np.full(queries, np.nan, np.float32),
        negative_score=np.full((queries, negatives), np.nan, np.float32),
    )


def taken_apart(options: Options, tuning: Tuning) -> tuple[Split, Any, Any]:
    """(parts, trained with its temperature, frozen); adapters that do something already."""
    model = hf.load(models.resolve(options.model))
    parts, trained, frozen = parameters.split(model, tuning, key=jax.random.key(options.seed))
    if tuning.method != "full":  # a B of zeros would hide the gradient of A
        rng = np.random.default_rng(options.seed)
        for one in trained.values():
            one["b"] = jnp.asarray(0.02 * rng.standard_normal(one["b"].shape), jnp.float32)
    return parts, {"model": trained, "log_scale": jnp.log(jnp.float32(20.0))}, frozen


def programs(options: Options, parts: Split, negatives: int, *, remat: bool) -> GradCache:
    config = contrastive.Config(
        counts=Counts(1, negatives),
        rules=Rules(rows=options.rows),
        learn_temperature=True,
        remat=remat,
    )
    return contrastive.programs(config, parts, None)


def gradients(options: Options, tuning: Tuning) -> dict[str, Any]:
    """The largest distance between a gradient and the direct one, and what both are like."""
    parts, trained, frozen = taken_apart(options, tuning)
    run = programs(options, parts, options.negatives, remat=True)
    count, size = options.queries * (2 + options.negatives), parts.config.text.hidden_size
    every = inputs(parts.config, count, np.random.default_rng(options.seed))
    items = [Item(one, i) for i, one in enumerate(every)]
    made, fill = batches.pack([items], options.packing, parts.config, nowhere=count)
    placed = [batches.place(one, None, parts.config) for one in made]
    keys = [jax.random.fold_in(jax.random.key(options.seed), i) for i in range(len(placed))]
    known = labels(options.queries, options.negatives)
    (loss, _), found = run(trained, frozen, placed, keys, known, rows=count, size=size)
    direct = run.direct(trained, frozen, placed, keys, known, rows=count, size=size)
    (expected_loss, _), expected = direct
    without = [None] * len(keys)
    (dry, _), _ = run(trained, frozen, placed, without, known, rows=count, size=size)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, expected)
    largest = jax.tree.map(lambda a: float(jnp.abs(a).max()), expected)
    return {
        "sub_batches": len(placed),
        "sequences": count,
        "pad_share": fill.pad_share,
        "loss": float(loss),
        "loss_apart": abs(float(loss) - float(expected_loss)),
        "gradients_apart": max(jax.tree.leaves(apart)),
        "largest_gradient": max(jax.tree.leaves(largest)),
        "dropout_moves_the_loss_by": abs(float(dry) - float(loss)),
    }


def memory(options: Options, tuning: Tuning) -> dict[str, Any]:
    """Bytes of temporaries by program and global batch."""
    parts, trained, frozen = taken_apart(options, tuning)
    size = parts.config.text.hidden_size
    rng, found = np.random.default_rng(options.seed), {}
    part = _sub_batches(options, parts, 16, rng)[0]
    key, trees = jax.random.key(0), jax.eval_shape(lambda x: x, (trained, frozen))
    for batch in options.batches:
        run = programs(options, parts, 0, remat=True)
        buffer = jax.ShapeDtypeStruct((2 * batch, size), jnp.float32)
        lowered = {
            "forward": run.forward.lower(*trees, part, key, buffer),
            "loss": run.loss.lower(buffer, trees[0], labels(batch, 0)),
            "backward": run.backward.lower(*trees, part, key, buffer, trees[0]),
        }
        found[str(batch)] = {name: temporaries(one) for name, one in lowered.items()}
        found[str(batch)]["vectors"] = 2 * batch * size * 4
        if batch in options.direct:
            found[str(batch)]["direct"] = _direct(options, parts, trees, batch, rng)
        print(batch, found[str(batch)], file=sys.stderr, flush=True)
    return found


def _direct(
    options: Options, parts: Split, trees: Any, batch: int, rng: np.random.Generator
) -> int:
    """Temporaries of one program for the whole step, layers kept as they come."""
    run = programs(options, parts, 0, remat=False)
    whole = replace(options, tokens=64 * batch)  # a sub-batch each of the two lengths
    made = _sub_batches(whole, parts, 2 * batch, rng)
    keys = [jax.random.key(i) for i in range(len(made))]
    rows, size = 2 * batch, parts.config.text.hidden_size
    lowered = run.direct.lower(*trees, made, keys, labels(batch, 0), rows=rows, size=size)
    return temporaries(lowered)


def temporaries(lowered: jax.stages.Lowered) -> int:
    """Bytes that the compiled program holds beside its arguments and results."""
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise InternalError("XLA tells nothing of a program's memory on this backend")
    return analysis.temp_size_in_bytes


def _sub_batches(
    options: Options, parts: Split, count: int, rng: np.random.Generator
) -> list[SubBatch]:
    items = [Item(one, i) for i, one in enumerate(inputs(parts.config, count, rng))]
    made, _ = batches.pack([items], options.packing, parts.config, nowhere=count)
    return [one[0] for one in made]


def peak(figures: Mapping[str, int]) -> int:
    """Most temporaries that any of the three programs holds; they run one after the other."""
    return max(figures[name] for name in ("forward", "loss", "backward"))


def main(options: Options) -> int:
    without_avx512(os.environ)
    result: dict[str, Any] = {
        **environment.describe("benchmarks.gradcache"),
        "noisy": False,  # nothing here is a time
        "model": options.model,
        "sub_batch_tokens": options.tokens,
        "loss_rows": options.rows,
        "queries": options.queries,
        "negatives": options.negatives,
        "gradients": {},
    }
    for name, tuning in TUNINGS.items():
        result["gradients"][name] = gradients(options, tuning)
        print(name, result["gradients"][name], file=sys.stderr, flush=True)
    result["memory"] = memory(options, TUNINGS["LoRA, dropout 0.1"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
