"""The Qwen2-VL vision tower on packs of patches.

A pack holds patches of any number of images of any sizes. What depends on the sizes (rotary
coordinates, which patches belong together) is computed on the host by
`tte_jax.preprocess.vision_plan` and comes in as arrays, so one executable serves every image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tte_jax.models.config import VisionConfig
from tte_jax.models.initial import Initial
from tte_jax.models.stack import Stack, run_layers
from tte_jax.nn.attention import attend
from tte_jax.nn.linear import fold, project
from tte_jax.nn.norms import layer_norm
from tte_jax.nn.rotary import frequencies, rotary_tables, rotate

LAYER_NORM_EPS = 1e-6  # fixed in the reference implementation, not configurable
ROTARY_THETA = 10_000.0


def vision_rotary(hw: Int[Array, "G P 2"], head: int) -> tuple[Array, Array]:
    """Cosine and sine over (row, column) of each patch, as all towers here turn their heads."""
    inverse = frequencies(head // 2, ROTARY_THETA)
    axes = (0,) * len(inverse) + (1,) * len(inverse)
    return rotary_tables(jnp.swapaxes(hw, 1, 2), axes, np.tile(inverse, 2))


def vision_attention(
    h: Float[Array, "G P E"], w: dict[str, Array], cos: Array, sin: Array, mask: Array
) -> Float[Array, "G P E"]:
    """Self-attention of one block on normed states; `mask` [G P P] says who sees whom."""
    qkv = project("gpe,eanh->gpanh", h, w["qkv_e3nh"]) + w["qkv_bias_3nh"]
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask=mask)
    return project("gpnh,nhe->gpe", out, w["o_nhe"]) + w["o_bias_e"]


def joined(x: Float[Array, "G P E"], wide: int) -> Float[Array, "G P/M W"]:
    """Neighbouring patches' vectors in one row of `wide` values; packs stay split as they are."""
    return fold(x, x.shape[0], -1, wide)


def merge(
    x: Float[Array, "G P/M I"],
    fc1_gg: Array,
    fc1_bias_g: Array,
    fc2_gd: Array,
    fc2_bias_d: Array,
) -> Float[Array, "G P/M D"]:
    """The merger's MLP: joined patches to one vector of the text's width."""
    x = project("gpi,io->gpo", x, fc1_gg) + fc1_bias_g
    x = jax.nn.gelu(x, approximate=False)
    return project("gpi,id->gpd", x, fc2_gd) + fc2_bias_d


class AttentionBlocks(Stack):
    """What the stacked blocks of all towers hold: the scales of two norms and the attention."""

    def __init__(self, config: VisionConfig, new: Initial) -> None:
        e, heads = config.embed_dim, config.heads
        self.norm1_e = new.ones(e)
        self.qkv_e3nh = new.normal(e, 3, heads, e // heads)
        self.qkv_bias_3nh = new.zeros(3, heads, e // heads)
        self.o_nhe, self.o_bias_e = new.residual(heads, e // heads, e), new.zeros(e)
        self.norm2_e = new.ones(e)


class VisionBlocks(AttentionBlocks):
    """Blocks with layer norms and an MLP of two matrices (Qwen2-VL, Qwen3-VL)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype) -> None:
        e, inner = config.embed_dim, config.inner
        new = Initial(rngs, dtype, (config.depth,))
        super().__init__(config, new)
        self.norm1_bias_e, self.norm2_bias_e = new.zeros(e), new.zeros(e)
        self.fc1_ef, self.fc1_bias_f = new.normal(e, inner), new.zeros(inner)
        self.fc2_fe, self.fc2_bias_e = new.residual(inner, e), new.zeros(e)


class VisionTower(nnx.Module):
    """Patch embedding, blocks with per-segment attention, and the merger into text space."""

    def __init__(
        self, config: VisionConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        e, wide = config.embed_dim, config.embed_dim * config.merged
        new = Initial(rngs, dtype)
        self.patch_ce = new.normal(config.patch_values, e)
        self.blocks = VisionBlocks(config, rngs=rngs, dtype=dtype)
        self.merge_norm_e, self.merge_norm_bias_e = new.ones(e), new.zeros(e)
        self.merge1_gg, self.merge1_bias_g = new.normal(wide, wide), new.zeros(wide)
        self.merge2_gd = new.normal(wide, config.out_size)
        self.merge2_bias_d = new.zeros(config.out_size)

    def __call__(
        self,
        patches: Float[Array, "G P C"],
        hw: Int[Array, "G P 2"],
        segments: Int[Array, "G P"],
        *,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "G P/M D"]:
        """Encode G packs of P patches each.

        Args:
          patches: flattened patches in merge-block order (M neighbours in a row).
          hw: row and column of each patch, int32.
          segments: one id per image or video frame; 0 is padding and forms its own segment.
          remat: recompute blocks in the backward pass.
          unroll: compile every block apart; a backward pass on CPU is a sixth faster.

        Returns:
          One feature per M patches, in order; those of padding are to be ignored.
        """
        c = self.config
        patches = patches.astype(self.merge_norm_e[...].dtype)
        x = project("gpc,ce->gpe", patches, self.patch_ce[...])
        cos, sin = vision_rotary(hw, c.embed_dim // c.heads)
        mask = segments[:, :, None] == segments[:, None, :]

        def block(x: Array, scanned: tuple[dict[str, Array], None]) -> tuple[Array, None]:
            w, _ = scanned
            h = layer_norm(x, w["norm1_e"], w["norm1_bias_e"], LAYER_NORM_EPS)
            x = x + vision_attention(h, w, cos, sin, mask)
            h = layer_norm(x, w["norm2_e"], w["norm2_bias_e"], LAYER_NORM_EPS)
            h = project("gpe,ef->gpf", h, w["fc1_ef"]) + w["fc1_bias_f"]
            h = h * jax.nn.sigmoid(1.702 * h)  # quick GELU
            return x + project("gpf,fe->gpe", h, w["fc2_fe"]) + w["fc2_bias_e"], None

        body = jax.checkpoint(block) if remat else block
        x, _ = run_layers(body, x, self.blocks.weights(), unroll=unroll)
        x = layer_norm(x, self.merge_norm_e[...], self.merge_norm_bias_e[...], LAYER_NORM_EPS)
        return merge(
            joined(x, c.embed_dim * c.merged),
            self.merge1_gg[...],
            self.merge1_bias_g[...],
            self.merge2_gd[...],
            self.merge2_bias_d[...],
        )
