"""Analytic FLOPs of training, for MFU. A product of [a b] and [b c] counts 2 a b c.

    text      2 N T + 2 L heads head_dim T^2 a sequence of T tokens: N weights in its matrices (the
              table and the head are not used for embedding), causal attention at half the square
    vision    the same for each image by itself, attention not causal: 4 depth E P^2
    training  forward and backward of activations 2 x, gradients of weights 1 x: 3 x the forward for
              full fine-tuning, 2 x where the weights are frozen behind what is trained, and 1 x for
              a frozen tower

What GradCache and rematerialisation compute again is the hardware's, not the model's, and pads
count for nothing: MFU says how much of the hardware went into what the mathematics asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax

from tte_jax.models.config import ModelConfig
from tte_jax.plan import abstract_parameters

# Dense bfloat16, by what `device_kind` begins with; makers' data sheets.
PEAK_TFLOPS = {
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA A100": 312.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6": 918.0,
}


@dataclass(frozen=True)
class Costs:
    """Of one model.

    Attributes:
      per_token, per_square: forward FLOPs of the decoder by token and by squared sequence length.
      per_patch, per_patch_square: of the vision tower, likewise.
      per_logit_row: of the output head, for each token that is predicted.
    """

    per_token: float
    per_square: float
    per_patch: float
    per_patch_square: float
    per_logit_row: float

    def training(
        self,
        *,
        tokens: float,
        squares: float,
        patches: float = 0,
        patch_squares: float = 0,
        predicted: float = 0,
        full: bool,
        tower: bool = False,
    ) -> float:
        """FLOPs of one step.

        Args:
          tokens, squares, patches, patch_squares: sums over real sequences and images.
          predicted: tokens with a next-token loss.
          full: weights are trained, not adapters beside them; tower: those of the tower as well.
        """
        text = tokens * self.per_token + squares * self.per_square + predicted * self.per_logit_row
        seen = patches * self.per_patch + patch_squares * self.per_patch_square
        return text * (3 if full else 2) + seen * (3 if tower else 1)


def costs(config: ModelConfig) -> Costs:
    """From the configuration; nothing is allocated."""
    text, c, v = 0, config.text, config.vision
    tower, merger = 0, 0
    for path, leaf in abstract_parameters(config).items():
        name = path.rsplit(".", 1)[-1]
        matrix = len(name.rsplit("_", 1)[-1].replace("3", "")) > 1 and "bias" not in name
        if not matrix or path in ("text.embed_vd", "text.head_dv", "visual.table_se"):
            continue
        if path.startswith("text."):
            text += prod(leaf.shape)
        elif ".blocks." in path or "patch_" in path:
            tower += prod(leaf.shape)
        else:
            merger += prod(leaf.shape)
    return Costs(
        per_token=2.0 * text,
        per_square=2.0 * c.layers * c.heads * c.head_dim,
        per_patch=0.0 if v is None else 2.0 * tower + 2.0 * merger / v.merged,
        per_patch_square=0.0 if v is None else 4.0 * v.depth * v.embed_dim,
        per_logit_row=2.0 * c.vocab_size * c.hidden_size,
    )


def peak_flops(given_tflops: float = 0.0) -> float:
    """FLOP/s of all devices of the job together; 0 = unknown, which leaves MFU out.

    Args:
      given_tflops: of one device; 0 = by its kind.
    """
    kind = jax.devices()[0].device_kind
    known = [v for k, v in sorted(PEAK_TFLOPS.items(), key=lambda x: -len(x[0]))
             if kind.startswith(k)]  # fmt: skip
    one = given_tflops or (known[0] if known else 0.0)
    return one * 1e12 * jax.device_count()
