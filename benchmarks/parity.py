"""`python -m benchmarks.parity [FAMILY …]`: every family against transformers, as a table.

Tiny random checkpoints, saved by transformers in its on-disk format and loaded by ours; the figure
is the largest deviation of fp32 logits at real tokens. Ends with 1 when one is above the limit.
Families that are named are measured anew, and those of the result file kept beside them. Needs
torch, which is a development dependency only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.utils import logging

import tte_jax
from benchmarks import environment
from tests.models import conftest as tiny
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.preprocess.positions import mrope_positions
from tte_jax.preprocess.vision_plan import plan_vision

LIMIT = 1e-4
BUCKET = 128
"""Patches of the row in which three unequal images, 104 patches, are encoded a second time."""
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
    """Largest absolute difference of logits at real tokens.

    Three unequal images are also encoded as serving does it, in a row of `BUCKET` patches whose
    rest is padding that holds garbage; the larger deviation counts.
    """
    saved, model = checkpoint(family, case)
    arrays = batch(family, case)
    real = arrays["attention_mask"] > 0
    expected, _ = saved.answers(arrays)
    if expected[real].std() < 0.5:
        raise RuntimeError(f"{family}, {case}: degenerate weights, the comparison says nothing")
    found = [model(**arrays).logits]
    if case == "3 unequal images":
        found.append(in_bucket(model, arrays))
    return max(float(np.abs(logits[real] - expected[real]).max()) for logits in found)


def in_bucket(model: tte_jax.Model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Logits with the images in one row of `BUCKET` patches."""
    vision = model.config.vision
    assert vision is not None
    patches = arrays["pixel_values"]
    row = np.random.default_rng(5).normal(0, 10, (1, BUCKET, patches.shape[1])).astype(np.float32)
    row[0, : len(patches)] = patches
    grids = [tuple(grid) for grid in arrays["image_grid_thw"].tolist()]
    plan = plan_vision(grids, bucket=BUCKET, **vision.plan)
    (ids,) = arrays["input_ids"].astype(np.int32)
    positions, _ = mrope_positions(
        ids, grids, image_token_id=tiny.IMAGE, video_token_id=tiny.VIDEO, merge_size=2
    )
    vis_idx = np.where(ids == tiny.IMAGE, np.cumsum(ids == tiny.IMAGE) - 1, -1)
    pack = (row, *(x[None] for x in plan.arrays))
    return np.asarray(_forward(model.module, ids[None], positions[None], vis_idx[None], *pack))


@jax.jit
def _forward(module: MultimodalLM, ids: Any, positions: Any, vis_idx: Any, *pack: Any) -> jax.Array:
    vis, valid = module.encode_images(*pack), jnp.ones(ids.shape, bool)
    hidden, _ = module.forward(ids, valid=valid, positions=positions, vis=vis, vis_idx=vis_idx)
    return module.logits(hidden)


def checkpoints(root: Path) -> Callable[..., Any]:
    """(reference checkpoint, our model) of a family and a case, each kind made once."""
    made: dict[tuple[str, bool, bool], Any] = {}

    def get(family: str, case: str) -> Any:
        kind = (family, case != "untied", case == "bf16 shards")
        if kind not in made:
            _, tied, shards = kind
            reference: Any = tiny.FAMILIES[family](tied=tied)
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


def main(arguments: Sequence[str]) -> int:
    if unknown := set(arguments) - set(tiny.FAMILIES):
        known = ", ".join(tiny.FAMILIES)
        print(f"unknown: {', '.join(sorted(unknown))}; there are {known}", file=sys.stderr)
        return 2
    logging.disable_progress_bar()  # of saving and loading; they would stand between the cells
    before = json.loads(RESULT.read_text()) if arguments and RESULT.is_file() else {}
    rows: dict[str, dict[str, float | None]] = before.get("largest_deviation_of_logits", {})
    seconds: dict[str, dict[str, float]] = before.get("seconds", {})
    print(f"{'':12}" + "".join(f"{case:>18}" for case in CASES), flush=True)
    for family in arguments or tiny.FAMILIES:
        rows[family], seconds[family] = measured(family)
    missed = [(f, c) for f, r in rows.items() for c, v in r.items() if misses(v)]
    result = {
        **environment.describe("benchmarks.parity"),
        "reference": {"torch": torch.__version__},
        "limit": LIMIT,
        "largest_deviation_of_logits": {f: rows[f] for f in tiny.FAMILIES if f in rows},
        "missed": [" / ".join(pair) for pair in missed],
        "seconds": {f: seconds[f] for f in tiny.FAMILIES if f in seconds},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"limit {LIMIT:g} · {len(missed)} missed · {RESULT.relative_to(environment.ROOT)}")
    return 1 if missed else 0


def measured(family: str) -> tuple[dict[str, float | None], dict[str, float]]:
    """(deviation, seconds) of every case of a family, printed as they come."""
    row: dict[str, float | None] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        get = checkpoints(Path(root))
        print(f"{family:12}", end="", flush=True)
        for case in CASES:
            known = family in MULTIMODAL or case in TEXT_CASES
            began = time.perf_counter()
            row[case] = value = deviation(family, case, get) if known else None
            if known:
                seconds[case] = round(time.perf_counter() - began, 2)
            print(f"{_cell(value):>18}", end="", flush=True)
        print(f"{sum(seconds.values()):>8.0f} s", flush=True)
    return row, seconds


def misses(value: float | None) -> bool:
    """Whether a deviation is above the limit; a NaN is."""
    return value is not None and not value <= LIMIT


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e} {'MISS' if misses(value) else 'ok'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
