"""How large a run of `benchmarks.gpu` is: the whole one, and one that ends in a minute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tte_jax.engine.buckets import Buckets
from tte_jax.models.shapes import QWEN2_VL


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
      raw: configuration of the model.
      buckets: the ladder.
      texts, pictures: tokens of a text; (side in patches) of small and large pictures.
      inputs: embedded. prefill: tokens of the sequences whose MFU is taken, and how many.
      candidates, pairs: of one query; (prefix, suffix) tokens.
      prompt, new: tokens read and written where decoding is measured.
      budgets: least and most new tokens of the 16 concurrent requests.
      matrix, memory: size of the product and bytes of the read that give the device's rates.
    """

    raw: dict[str, Any]
    buckets: Buckets
    texts: tuple[int, int]
    pictures: tuple[int, int]
    inputs: int
    prefill: tuple[int, int]
    candidates: int
    pairs: tuple[tuple[int, int], ...]
    prompt: int
    new: int
    budgets: tuple[int, int]
    batches: tuple[int, ...]
    matrix: int
    memory: int
    rounds: int


WHOLE = Scale(
    raw=QWEN2_VL["2B"],
    buckets=Buckets(
        images=((8, 256), (8, 1024)),
        prefill=((1, 128), (8, 128), (4, 512), (16, 512)),
        embed=((2, 256), (8, 256), (8, 1024)),
        prefix=(400, 512),
        score=((25, 64), (25, 100)),
        decode=((1, 1024), (2, 1024), (4, 1024), (8, 1024), (16, 1024)),
        new_tokens=512,
        decode_steps=16,
    ),
    texts=(20, 60),
    pictures=(16, 32),
    inputs=256,
    prefill=(1024, 64),
    candidates=50,
    pairs=((512, 64), (400, 100)),
    prompt=500,
    new=256,
    budgets=(32, 256),
    batches=(1, 2, 4, 8, 16),
    matrix=8192,
    memory=2**32,
    rounds=5,
)
TINY = Scale(
    raw=QWEN2_VL["2B"]
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
    | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    | {"image_token_id": 509, "video_token_id": 510, "vision_start_token_id": 511}
    | {"vision_config": QWEN2_VL["2B"]["vision_config"]
       | {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}},
    buckets=Buckets(
        images=((2, 64),), prefill=((4, 32),), embed=((4, 32),), prefix=(16,), score=((4, 16),),
        decode=((1, 48), (4, 48)), new_tokens=16, decode_steps=4,
    ),
    texts=(4, 9), pictures=(4, 8), inputs=9, prefill=(32, 4), candidates=6, pairs=((16, 8),),
    prompt=10, new=16, budgets=(4, 16), batches=(1, 4), matrix=128, memory=2**20, rounds=1,
)  # fmt: skip
