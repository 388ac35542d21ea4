"""The Qwen3-VL vision tower: a learned position table beside the rotary one, and DeepStack.

DeepStack merges the states after some blocks as well, and the text decoder adds them to its own
after its first layers. The tower returns all of it as one row per vision token, the embedding
followed by what is added, so that one table and one index carry both to the decoder.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tte_jax.models.config import DeepStackVisionConfig
from tte_jax.models.initial import Initial
from tte_jax.models.stack import part, run_layers
from tte_jax.models.vision import (
    LAYER_NORM_EPS,
    VisionBlocks,
    joined,
    merge,
    vision_attention,
    vision_rotary,
)
from tte_jax.nn.linear import lookup, project
from tte_jax.nn.norms import layer_norm


class Merger(nnx.Module):
    """M neighbouring patches to one vector of the text's width."""

    def __init__(
        self,
        config: DeepStackVisionConfig,
        *,
        norm_merged: bool,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype,
    ) -> None:
        self.norm_merged = norm_merged
        self.wide = config.embed_dim * config.merged
        size = self.wide if norm_merged else config.embed_dim
        new = Initial(rngs, dtype)
        self.norm_e, self.norm_bias_e = new.ones(size), new.zeros(size)
        self.fc1_gg, self.fc1_bias_g = new.normal(self.wide, self.wide), new.zeros(self.wide)
        self.fc2_gd = new.normal(self.wide, config.out_size)
        self.fc2_bias_d = new.zeros(config.out_size)

    def __call__(self, x: Float[Array, "G P E"]) -> Float[Array, "G P/M D"]:
        """`norm_merged` says whether the norm is over the merged vector or over each patch."""
        if self.norm_merged:
            x = joined(x, self.wide)
        x = layer_norm(x, self.norm_e[...], self.norm_bias_e[...], LAYER_NORM_EPS)
        return merge(
            joined(x, self.wide),
            self.fc1_gg[...],
            self.fc1_bias_g[...],
            self.fc2_gd[...],
            self.fc2_bias_d[...],
        )


class DeepStackVisionTower(nnx.Module):
    """Patch and position embedding, blocks, and one merger per tapped block and for the end."""

    def __init__(
        self,
        config: DeepStackVisionConfig,
        *,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.config = config
        e = config.embed_dim
        new = Initial(rngs, dtype)
        self.patch_ce, self.patch_bias_e = new.normal(config.patch_values, e), new.zeros(e)
        self.table_se = new.normal(config.table_side**2, e)
        self.blocks = VisionBlocks(config, rngs=rngs, dtype=dtype)
        self.merger = Merger(config, norm_merged=False, rngs=rngs, dtype=dtype)
        for i in range(len(config.deepstack_blocks)):
            setattr(self, f"deepstack{i}", Merger(config, norm_merged=True, rngs=rngs, dtype=dtype))

    def __call__(
        self,
        patches: Float[Array, "G P C"],
        hw: Int[Array, "G P 2"],
        segments: Int[Array, "G P"],
        taps: Int[Array, "G P 4"],
        tap_weights: Float[Array, "G P 4"],
        *,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "G P/M D*(1+K)"]:
        """Encode G packs of P patches each; see `VisionTower`.

        Args:
          taps: the four rows of the position table around each patch.
          tap_weights: their bilinear weights, float32; zeros at padding.

        Returns:
          For each vision token its embedding and the K vectors to add after text layers 0..K-1.
        """
        c = self.config
        dtype = self.patch_bias_e[...].dtype
        x = project("gpc,ce->gpe", patches.astype(dtype), self.patch_ce[...])
        x = x + self.patch_bias_e[...]
        places = lookup(self.table_se[...], taps)
        x = x + jnp.einsum("gpae,gpa->gpe", places, tap_weights).astype(dtype)
        cos, sin = vision_rotary(hw, c.embed_dim // c.heads)
        mask = segments[:, :, None] == segments[:, None, :]

        def block(x: Array, scanned: tuple[dict[str, Array], None]) -> tuple[Array, None]:
            w, _ = scanned
            h = layer_norm(x, w["norm1_e"], w["norm1_bias_e"], LAYER_NORM_EPS)
            x = x + vision_attention(h, w, cos, sin, mask)
            h = layer_norm(x, w["norm2_e"], w["norm2_bias_e"], LAYER_NORM_EPS)
            h = project("gpe,ef->gpf", h, w["fc1_ef"]) + w["fc1_bias_f"]
            h = jax.nn.gelu(h, approximate=True)
            return x + project("gpf,fe->gpe", h, w["fc2_fe"]) + w["fc2_bias_e"], None

        body = jax.checkpoint(block) if remat else block
        # One scan up to each tapped block, so that only the tapped states are kept.
        weights, begin = self.blocks.weights(), 0
        tapped: dict[int, Array] = {}
        for end in sorted({*(i + 1 for i in c.deepstack_blocks), c.depth}):
            x, _ = run_layers(body, x, part(weights, begin, end), unroll=unroll)
            tapped[end - 1] = x
            begin = end
        added = [
            getattr(self, f"deepstack{i}")(tapped[at]) for i, at in enumerate(c.deepstack_blocks)
        ]
        return jnp.concatenate([self.merger(x), *added], axis=-1)
