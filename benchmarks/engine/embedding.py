"""256 mixed inputs: texts, small and large pictures, each with a reasoning."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.engine import reference
from benchmarks.engine.rounds import interleave, ratio, row, spread
from tte_jax.builtin import openmoji
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder, EmbedJob
from tte_jax.engine.inputs import model_input
from tte_jax.engine.role import results
from tte_jax.stages import EmbedItem

BATCHES = (4, 8, 16, 32)


def inputs(count: int, *, largest: int, seed: int = 0) -> list[EmbedItem]:
    """A third each of texts, pictures of 56 pixels, and pictures of up to `largest`, shuffled."""
    rng = np.random.default_rng(seed)
    entries = list(openmoji.entries())
    items = []
    for i in rng.permutation(count):
        name = entries[rng.integers(len(entries))].shown.name
        ecr = f"<think>{' '.join(name.split()[:2])}: {name}</think>\nAnswer: {name}"
        if i % 3 == 0:
            words = [entries[rng.integers(len(entries))].shown.name for _ in range(i % 5 + 1)]
            content = Content.of(", ".join(words))
        else:
            side = 56 if i % 3 == 1 else int(rng.integers(largest // 2, largest + 1))
            content = Content.of("", picture(rng, side))
        items.append(EmbedItem(content, Side.DOCUMENT, ecr))
    return items


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A PNG that no cache has seen."""
    out = io.BytesIO()
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(out, "PNG")
    return out.getvalue()


def compare(directory: Path, *, count: int, rounds: int, largest: int) -> dict[str, Any]:
    """Throughput of both sides from the same prompts: texts as token ids, pictures as patches.

    Positions, batches, features and vectors are made anew in each round.
    """
    items = inputs(count, largest=largest)
    torch = reference.VisionLanguage.from_dir(directory)
    with Embedder.from_pretrained(directory) as embedder:
        prompts = [embedder.served.prompts.embed(item) for item in items]
        tokens = np.array([len(p.ids) for p in prompts])

        def ours() -> np.ndarray:
            assert embedder.vision is not None
            embedder.vision.cache.clear()
            jobs = [EmbedJob(model_input(p, embedder.served.config)) for p in prompts]
            return embedder.collect(results(embedder.submit(jobs, wait=True)))[0]

        embedder.warmup()

        sample = prompts[: max(count // 4, 8)]
        tried = interleave({str(b): _run(torch, sample, b) for b in BATCHES}, 1)
        best = min(BATCHES, key=lambda b: min(tried[str(b)]))
        deviation = float(np.abs(ours() - torch.embed(prompts, best)).max())
        before = replace(embedder.queue.stats)
        seconds = interleave({"ours": ours, "torch": _run(torch, prompts, best)}, rounds)
        after = embedder.queue.stats
        places = after.token_places - before.token_places
    return {
        "inputs": count,
        "tokens": {"mean": round(float(tokens.mean()), 1), "most": int(tokens.max())},
        "torch_batch": best,
        "pad_share": round(1 - (after.tokens - before.tokens) / places, 3),
        "batches": round((after.batches - before.batches) / (rounds + 1), 1),
        "largest_deviation": deviation,
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "rows": [
            row(
                f"embed {count} mixed inputs, against PyTorch in batches of {best}",
                ratio(seconds["torch"], seconds["ours"]),
                1.5,
                " ×",
            )
        ],
    }


def _run(torch: reference.VisionLanguage, prompts: Sequence[Any], batch: int):
    return lambda: torch.embed(prompts, batch)
