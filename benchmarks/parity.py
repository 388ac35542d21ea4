"""`python -m benchmarks.parity`: every family against transformers, as a table.

Tiny random checkpoints, saved by transformers in its on-disk format and loaded by ours; the figure
is the largest deviation of fp32 logits at real tokens. Ends with 1 when one is above the limit.
Needs torch, which is a development dependency only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

import tte_jax
from benchmarks import environment
from tests.models import conftest as tiny

LIMIT = 1e-4
RESULT = environment.ROOT / "benchmarks" / "results" / "parity.json"
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_CASES = ("text", "left pad", "right pad", "tied", "untied", "bf16 shards")
CASES = ("text", "1 image", "3 unequal images", "video", *TEXT_CASES[1:])


def batch(family: str, case: str) -> dict[str, np.ndarray]:
    """The arrays of one case; the pads' and weights' cases hold images where the family can."""
    side = "left" if case == "left pad" else "right"
    if family not in MULTIMODAL or case == "text":
        return tiny.text_batch(side)
    if case == "video":
        return tiny.videos_batch(family, side)
    if case in ("1 image", "3 unequal images"):
        # 12 + 32 + 60 = 104 patches: not a multiple of 16, the smallest bucket of any ladder.
        grids = [[1, 6, 10]] if case == "1 image" else [[1, 2, 6], [1, 8, 4], [1, 6, 10]]
        rng = np.random.default_rng(4)
        images = [tiny.picture(rng, h, w) for _, h, w in grids]
        row = sum((tokens + tiny.text_row(rng, 2) for _, tokens in images), [])
        return {
            **tiny.padded([row], side),
            "pixel_values": np.concatenate([patches for patches, _ in images]),
            "image_grid_thw": np.array(grids, np.int64),
        }
    return tiny.images_batch(side)


def deviation(family: str, case: str, checkpoint: Callable[..., Any]) -> float:
    """Largest absolute difference of logits at real tokens."""
    saved, model = checkpoint(family, case)
    arrays = batch(family, case)
    real = arrays["attention_mask"] > 0
    expected, _ = saved.answers(arrays)
    if expected[real].std() < 0.5:
        raise RuntimeError(f"{family}, {case}: degenerate weights, the comparison says nothing")
    return float(np.abs(model(**arrays).logits[real] - expected[real]).max())


def checkpoints(root: Path) -> Callable[..., Any]:
    """(reference checkpoint, our model) of a family and a case, each kind made once."""
    made: dict[tuple[str, bool, bool], Any] = {}

    def get(family: str, case: str) -> Any:
        kind = (family, case != "untied", case == "bf16 shards")
        if kind not in made:
            _, tied, shards = kind
            reference = tiny.FAMILIES[family](tied=tied)
            path = root / "-".join(map(str, kind))
            if shards:
                reference = reference.to(torch.bfloat16)
                reference.save_pretrained(path, max_shard_size="100KB")
                if len(list(path.glob("*.safetensors"))) < 2:
                    raise RuntimeError(f"{path} has one file only, the case is not what it says")
                # Read again, not cast back: the cast would have rounded the rotary tables too.
                reference = type(reference).from_pretrained(path, dtype=torch.float32).eval()
            else:
                reference.save_pretrained(path)
            made[kind] = tiny.Checkpoint(path, reference), tte_jax.load_model(path)
        return made[kind]

    return get


def main() -> int:
    logging.disable_progress_bar()  # of saving and loading; they would stand between the cells
    rows: dict[str, dict[str, float | None]] = {}
    print(f"{'':12}" + "".join(f"{case:>18}" for case in CASES), flush=True)
    with tempfile.TemporaryDirectory() as root:
        for family in tiny.FAMILIES:
            get = checkpoints(Path(root))
            row = rows[family] = {}
            print(f"{family:12}", end="", flush=True)
            for case in CASES:
                known = family in MULTIMODAL or case in TEXT_CASES
                value = row[case] = deviation(family, case, get) if known else None
                print(f"{_cell(value):>18}", end="", flush=True)
            print(flush=True)
    missed = [(f, c) for f, r in rows.items() for c, v in r.items() if _misses(v)]
    result = {
        **environment.describe("benchmarks.parity"),
        "reference": {"torch": torch.__version__},
        "limit": LIMIT,
        "largest_deviation_of_logits": rows,
        "missed": [" / ".join(pair) for pair in missed],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"limit {LIMIT:g} · {len(missed)} missed · {RESULT.relative_to(environment.ROOT)}")
    return 1 if missed else 0


def _misses(value: float | None) -> bool:
    return value is not None and not value <= LIMIT  # a NaN misses


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e} {'MISS' if _misses(value) else 'ok'}"


if __name__ == "__main__":
    sys.exit(main())
