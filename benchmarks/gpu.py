"""The engine on an accelerator: a 2B model in bfloat16 against PyTorch and the device's own rates.

    python -m benchmarks.gpu                     a GPU machine; no network, no checkpoint, no index
    python -m benchmarks.gpu --only decode prefill
    python -m benchmarks.gpu --tiny --out /tmp/gpu.json     a tiny shape in a minute, on a CPU too

Needs the repository, JAX, Flax, and for the other side PyTorch with transformers; without those the
rows that compare are left out. The model is Qwen2-VL-2B's shape with random weights: equal work for
both sides, and no answers to compare (that they agree is what `make parity` shows). Our side is the
engine itself, its queue, threads and host work included. Every part is written when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# First of all: what it does must be done before JAX and the engine are imported.
import benchmarks.gpu_process  # noqa: F401, I001  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import environment, gpu_torch, gpu_trace
from benchmarks.engine.rounds import interleave, ratio, row, spread
from benchmarks.gpu_scale import TINY, WHOLE, Scale
from benchmarks.markdown import table
from tte_jax.embedder import Embedder, EmbedJob
from tte_jax.engine.executables import ExecutableTable, enable_compile_cache
from tte_jax.engine.inputs import ImageInput, ModelInput
from tte_jax.engine.jobs import Job
from tte_jax.engine.next_token import Stops
from tte_jax.engine.served_model import ServedModel
from tte_jax.engine.slots import DecodeLoop
from tte_jax.models import qwen2_vl
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.positions import mrope_positions, text_positions
from tte_jax.reranker import Reranker, ScoreJob

# Dense bfloat16 products a second and bytes a second of the memory, as the makers publish them.
PUBLISHED = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12),
    "L40S": (362e12, 0.864e12),
    "TPU v5 lite": (197e12, 0.819e12),
}
PARTS = ("rates", "decode", "prefill", "embed", "rerank", "generate")


class Bench:
    """A random model and what is measured on it."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.config: ModelConfig = qwen2_vl.parse(scale.raw, None)
        self.model = random_model(self.config)
        self.rng = np.random.default_rng(0)
        self.served = ServedModel(
            directory=Path("."), name="random", version="random@0", dtype="bfloat16",
            model=self.model, config=self.config, buckets=scale.buckets,
            prompts=types.SimpleNamespace(yes_id=1, no_id=2, load=None),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        self.rates: dict[str, float] = {}
        self.torch = gpu_torch.sides(scale.raw)
        device = jax.devices()[0]
        self.published = next(
            (rates for name, rates in PUBLISHED.items() if name in device.device_kind), None
        )

    # What is asked

    def text(self, tokens: int) -> np.ndarray:
        return self.rng.integers(3, 500, tokens).astype(np.int32)

    def sequence(self, tokens: int, side: int = 0) -> ModelInput:
        """A sequence of so many text tokens, with a picture of side x side patches before them."""
        c, ids, images = self.config, self.text(tokens), ()
        if not side:
            return ModelInput(ids, text_positions(tokens, 0), tokens, (), np.zeros(tokens, bool))
        assert c.vision is not None and c.image_token_id is not None
        patches = self.rng.normal(size=(side * side, c.vision.patch_values)).astype(np.float32)
        key = str(self.rng.integers(2**62))
        images = (ImageInput(key, patches, (1, side, side)),)
        shown = np.full(side * side // c.vision.merged, c.image_token_id, np.int32)
        start = c.vision_start_token_id
        assert start is not None
        ids = np.concatenate([[start], shown, ids]).astype(np.int32)
        positions, after = mrope_positions(
            ids, [images[0].grid], image_token_id=c.image_token_id,
            video_token_id=c.video_token_id or -1, merge_size=c.vision.merge_size,
            vision_start_token_id=start,
        )  # fmt: skip
        return ModelInput(ids, positions, after, images, ids == c.image_token_id)

    # Parts

    def measure_rates(self) -> dict[str, Any]:
        """What the device does at best here: a large product, and reading memory."""
        s = self.scale
        a = jnp.ones((s.matrix, s.matrix), jnp.bfloat16)
        memory = jnp.ones(s.memory // 2, jnp.bfloat16)
        product = jax.jit(lambda a: a @ a)
        total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
        seconds = interleave(
            {
                "matmul": lambda: product(a).block_until_ready(),
                "memory": lambda: total(memory).block_until_ready(),
            },
            max(s.rounds, 3),
        )
        self.rates = {
            "flops": 2 * s.matrix**3 / min(seconds["matmul"]),
            "bytes": memory.nbytes / min(seconds["memory"]),
        }
        return {
            "measured": {"tflops": self.rates["flops"] / 1e12, "gb_s": self.rates["bytes"] / 1e9},
            "published": self.published
            and {"tflops": self.published[0] / 1e12, "gb_s": self.published[1] / 1e9},
            "rows": [],
        }

    def peak(self) -> tuple[float, float, str]:
        """(products a second, bytes a second, whose figures they are)."""
        if self.published:
            return *self.published, "published"
        return self.rates["flops"], self.rates["bytes"], "measured"

    def measure_decode(self) -> dict[str, Any]:
        """Sequences of one length decoded together, through the loop that serves."""
        s, text = self.scale, self.config.text
        _, bandwidth, whose = self.peak()
        weights = 2 * (
            parameters(self.config, embedding=False) + text.vocab_size * text.hidden_size
        )
        kv = 2 * 2 * text.layers * text.kv_heads * text.head_dim
        batches, rows = {}, []
        with self.loop() as loop:
            for batch in s.batches:
                rates = [self._decode(loop, batch) for _ in range(s.rounds + 1)][1:]
                step = statistics.median(rates)
                read = weights + batch * kv * (s.prompt + s.new // 2)
                share = read / step / bandwidth
                batches[batch] = {
                    "ms_a_step": step * 1e3, "tokens_s": batch / step, "bandwidth_share": share
                }  # fmt: skip
                rows.append(
                    row(
                        f"decode, batch {batch}: share of the {whose} bandwidth", _3(share), 0.6, ""
                    )
                )
            trace = gpu_trace.summarise(lambda: self._decode(loop, s.batches[0]))
        return {"batches": batches, "trace": trace, "rows": rows}

    def _decode(self, loop: DecodeLoop, batch: int) -> float:
        """Seconds a step, between the first and the last tokens of a batch."""
        s, times = self.scale, []
        jobs = [
            Job(self.sequence(s.prompt), max_tokens=s.new,
                on_tokens=lambda ids, last: times.append((time.perf_counter(), len(ids))))
            for _ in range(batch)
        ]  # fmt: skip
        for future in loop.submit(jobs, wait=True):
            future.result()
        # All have their first token after the last prefill; from there on steps are all there is.
        prefilled = max(i for i, (_, n) in enumerate(times) if n == 1 and i < 2 * batch)
        tokens = sum(n for _, n in times[prefilled + 1 :])
        return (times[-1][0] - times[prefilled][0]) / (tokens / batch)

    def measure_prefill(self) -> dict[str, Any]:
        """Long sequences through the embedder: one pass over all tokens, nothing generated."""
        tokens, count = self.scale.prefill
        text = self.config.text
        flops, _, whose = self.peak()
        pairs = tokens * (tokens + 1) / 2
        work = count * (
            2 * tokens * parameters(self.config, embedding=False)
            + 4 * text.layers * text.heads * text.head_dim * pairs
        )
        with self.embedder() as embedder:
            jobs = [EmbedJob(self.sequence(tokens)) for _ in range(count)]
            seconds = interleave({"ours": lambda: run(embedder, jobs)}, self.scale.rounds)["ours"]
            trace = gpu_trace.summarise(lambda: run(embedder, jobs))
        mfu = work / statistics.median(seconds) / flops
        return {
            "seconds": spread(seconds), "tokens_s": count * tokens / statistics.median(seconds),
            "trace": trace,
            "rows": [row(f"prefill of {tokens} tokens: MFU of the {whose} rate", _3(mfu), 0.5, "")],
        }  # fmt: skip

    def measure_embed(self) -> dict[str, Any]:
        """A third each of texts, small and large pictures, features computed anew each round."""
        s = self.scale
        sizes = [
            (int(self.rng.integers(*s.texts)), (0, *s.pictures)[i % 3]) for i in range(s.inputs)
        ]
        inputs = [self.sequence(*size) for size in sizes]
        with self.embedder() as embedder:
            jobs = [EmbedJob(one) for one in inputs]

            def ours() -> None:
                assert embedder.vision is not None
                embedder.vision.cache.clear()
                run(embedder, jobs)

            sides: dict[str, Callable[[], Any]] = {"ours": ours}
            best = 0
            if self.torch is not None:
                prompts = [gpu_torch.Prompt(one) for one in inputs]
                tried = {
                    b: _time(lambda b=b: self.torch.vl.embed(prompts, b)) for b in (8, 16, 32, 64)
                }
                best = min(tried, key=lambda b: tried[b])
                sides["torch"] = lambda: self.torch.vl.embed(prompts, best)
            seconds = interleave(sides, s.rounds)
        rows = []
        if "torch" in seconds:
            what = f"embed {s.inputs} mixed inputs, against PyTorch in batches of {best}"
            rows.append(row(what, ratio(seconds["torch"], seconds["ours"]), 1.5, " ×"))
        return {"seconds": {k: spread(v) for k, v in seconds.items()}, "rows": rows}

    def measure_rerank(self) -> dict[str, Any]:
        """One query's candidates; the prefix is read anew in each round."""
        s, found, rows = self.scale, {}, []
        for prefix, suffix in s.pairs:
            before = self.sequence(prefix)
            after = [self.sequence(suffix) for _ in range(s.candidates)]
            jobs = [
                ScoreJob(before, ModelInput(one.ids, one.positions + prefix, one.next_pos + prefix,
                                            (), one.is_media), before.ids.tobytes())
                for one in after
            ]  # fmt: skip
            with Reranker(self.served) as reranker:
                reranker.warmup()

                def ours(reranker: Reranker = reranker, jobs: list[ScoreJob] = jobs) -> None:
                    reranker.prefix_cache.clear()
                    run(reranker, jobs)

                sides: dict[str, Callable[[], Any]] = {"ours": ours}
                if self.torch is not None:
                    ids = before.ids.astype(np.int64), np.array([a.ids for a in after], np.int64)
                    sides["pointwise"] = lambda i=ids: self.torch.text.pointwise(*i, 25)
                    sides["shared"] = lambda i=ids: self.torch.text.shared(*i, 25)
                seconds = interleave(sides, s.rounds)
            what = f"rerank {s.candidates} candidates, {prefix} + {suffix} tokens"
            if "pointwise" in seconds:
                allowed = s.candidates * (prefix + suffix) / (prefix + s.candidates * suffix)
                gain = ratio(seconds["pointwise"], seconds["ours"])
                rows.append(
                    row(f"{what}: share of what sharing allows", _3(gain / allowed), 0.8, "")
                )
                rows.append(
                    row(f"{what}, against PyTorch with its cache driven by hand",
                        ratio(seconds["shared"], seconds["ours"]), 1.0, " ×")
                )  # fmt: skip
            found[f"{prefix}/{suffix}"] = {k: spread(v) for k, v in seconds.items()}
        return {"seconds": found, "rows": rows}

    def measure_generate(self) -> dict[str, Any]:
        """16 requests at once whose prompts and budgets differ."""
        s = self.scale
        budgets = [int(b) for b in np.linspace(*s.budgets, 16)]
        lengths = self.rng.integers(s.texts[0], s.texts[1], 16)
        inputs = [self.sequence(int(n)) for n in lengths]
        self.rng.shuffle(budgets)
        first: dict[str, list[float]] = {"ours": [], "torch": []}
        with self.loop() as loop:

            def ours() -> None:
                began, times = time.perf_counter(), {}

                def listen(i: int) -> Callable[[list[int], bool], None]:
                    return lambda ids, last: times.setdefault(i, time.perf_counter() - began)

                jobs = [
                    Job(one, max_tokens=n, on_tokens=listen(i))
                    for i, (one, n) in enumerate(zip(inputs, budgets, strict=True))
                ]
                for future in loop.submit(jobs, wait=True):
                    future.result()
                first["ours"].append(statistics.median(times.values()))

            def theirs() -> None:
                began, times = time.perf_counter(), []
                self.torch.vl.generate(
                    [gpu_torch.Prompt(one) for one in inputs], max(budgets), [],
                    lambda: times.append(time.perf_counter() - began),
                )  # fmt: skip
                first["torch"].append(times[0])

            sides = {"ours": ours} | ({"torch": theirs} if self.torch is not None else {})
            seconds = interleave(sides, s.rounds)
        rows = []
        if "torch" in seconds:
            rows = [
                row("generate, 16 requests of unequal length: tokens/s against PyTorch",
                    ratio(seconds["torch"], seconds["ours"]), 2.0, " ×"),
                row("p50 time to the first token, of PyTorch's",
                    _3(1 / ratio(first["torch"][1:], first["ours"][1:])), 0.5, " ×", most=True),
            ]  # fmt: skip
        tokens_s = sum(budgets) / statistics.median(seconds["ours"])
        return {"seconds": {k: spread(v) for k, v in seconds.items()},
                "tokens_s": tokens_s, "rows": rows}  # fmt: skip

    # The engine

    def loop(self) -> Any:
        """The decode loop, warm; closed at the end of the block."""
        table = ExecutableTable(self.model)
        never = self.config.text.vocab_size
        stops = Stops(stop=(never,), close_tag=(never,), forced_close=(0,))
        loop = DecodeLoop(table, self.model, self.scale.buckets, stops, vision=None)
        table.warmup()
        loop.start()
        return _Closing(loop)

    def embedder(self) -> Embedder:
        embedder = Embedder(self.served)
        embedder.warmup()
        return embedder


class _Closing:
    """`with` for the decode loop."""

    def __init__(self, loop: DecodeLoop) -> None:
        self._loop = loop

    def __enter__(self) -> DecodeLoop:
        return self._loop

    def __exit__(self, *_: object) -> None:
        self._loop.close()


def run(role: Any, jobs: Sequence[Any]) -> None:
    """All jobs through a role's queue."""
    for future in role.submit(jobs, wait=True):
        future.result()


def random_model(config: ModelConfig) -> MultimodalLM:
    """Weights of deviation 0.02 in bfloat16, drawn on the device."""
    abstract = nnx.eval_shape(lambda: MultimodalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, state = nnx.split(abstract)
    keys = iter(range(10**6))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name and "bias" not in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        key = jax.random.key(next(keys))
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def parameters(config: ModelConfig, *, embedding: bool) -> int:
    """Values of the decoder's matrices, with or without the embedding table."""
    t = config.text
    heads = (2 * t.heads + 2 * t.kv_heads) * t.head_dim
    layers = t.layers * (t.hidden_size * heads + 3 * t.hidden_size * t.intermediate_size)
    return layers + (t.vocab_size * t.hidden_size if embedding else 0)


def _time(run: Callable[[], Any]) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _3(value: float) -> float:
    return float(f"{value:.3g}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: does it run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.tiny:
        parser.error("JAX sees no accelerator here; --tiny runs a tiny shape on this CPU")
    result: dict[str, Any] = environment.describe("benchmarks.gpu", list(arguments or sys.argv[1:]))
    with tempfile.TemporaryDirectory(prefix="tte-gpu-") as made:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # two parts share their programs
            enable_compile_cache(Path(made) / "compiled")
        bench = Bench(TINY if options.tiny else WHOLE)
        result |= {
            "device": device.device_kind,
            "shape": "tiny" if options.tiny else "Qwen2-VL-2B, bfloat16, random weights",
            "torch": bench.torch is not None,
            "parts": {},
        }
        for part in ("rates", *(p for p in options.only if p != "rates")):
            began = time.perf_counter()
            result["parts"][part] = getattr(bench, f"measure_{part}")()
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    lines = [[r["what"], f"{r['figure']:g}", r["goal"], r["verdict"]] for r in rows]
    print(table(["what", "figure", "goal", ""], lines))
    for part, found in result["parts"].items():
        if "trace" in found:
            print(f"Where {part} goes:\n{gpu_trace.text(found['trace'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
