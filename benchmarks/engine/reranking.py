"""Candidates of one query behind a shared prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import reference
from benchmarks.engine.rounds import interleave, ratio, row, spread
from tte_jax.reranker import Reranker

BATCHES = (5, 10, 25)
WORDS = "cat face animal smile person dark skin tone flag sun tree red".split()


def compare(
    directory: Path, *, candidates: int, prefix: int, suffix: int, rounds: int
) -> dict[str, Any]:
    """One query's candidates on both sides; the prefix is read anew in each round."""
    with Reranker.from_pretrained(directory) as reranker:
        prompts = reranker.served.prompts
        rng = np.random.default_rng(prefix)
        query = _text_of(lambda t: len(prompts.rerank_prefix(t).ids), prefix, rng)
        texts = [
            _text_of(lambda t: len(prompts.rerank_suffix(t).ids), suffix, rng)
            for _ in range(candidates)
        ]
        before = np.array(prompts.rerank_prefix(query).ids)
        after = np.array([prompts.rerank_suffix(t).ids for t in texts])
        torch = reference.Text.from_dir(directory, prompts.yes_id, prompts.no_id)

        def ours() -> np.ndarray:
            reranker.prefix_cache.clear()
            return reranker.score(query, texts)

        few = after[:10]
        tried = interleave(
            {str(b): lambda b=b: torch.pointwise(before, few, b) for b in BATCHES}, 1
        )
        best = min(BATCHES, key=lambda b: min(tried[str(b)]))
        tried = interleave({str(b): lambda b=b: torch.shared(before, after, b) for b in BATCHES}, 1)
        best_shared = min(BATCHES, key=lambda b: min(tried[str(b)]))
        deviation = float(np.abs(ours() - torch.shared(before, after, best_shared)).max())
        seconds = interleave(
            {
                "ours": ours,
                "torch pointwise": lambda: torch.pointwise(before, after, best),
                "torch shared": lambda: torch.shared(before, after, best_shared),
            },
            rounds,
        )
    allowed = candidates * (prefix + suffix) / (prefix + candidates * suffix)
    gain = ratio(seconds["torch pointwise"], seconds["ours"])
    what = f"rerank {candidates} candidates, {prefix} + {suffix} tokens"
    return {
        "candidates": candidates,
        "prefix": prefix,
        "suffix": suffix,
        "sharing_allows": round(allowed, 3),
        "gain_over_pointwise": gain,
        "torch_batch": {"pointwise": best, "shared": best_shared},
        "largest_deviation": deviation,
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "rows": [
            row(f"{what}: share of what sharing allows", round(gain / allowed, 3), 0.8, ""),
            row(
                f"{what}, against PyTorch with its cache driven by hand",
                ratio(seconds["torch shared"], seconds["ours"]),
                1.0,
                " ×",
            ),
        ],
    }


def _text_of(count: Callable[[str], int], tokens: int, rng: np.random.Generator) -> str:
    """Words that make exactly `tokens` tokens of the prompt."""
    text = str(rng.choice(WORDS))
    for _ in range(20 * tokens):
        longer = f"{text} {rng.choice(WORDS)}"
        if (size := count(longer)) <= tokens:
            text = longer
        if size == tokens:
            return text
    raise RuntimeError(f"no text of {tokens} tokens was found")
