"""The Qwen2.5-VL vision tower: most blocks attend within windows of a frame.

The reference permutes the patches so that each window stands together. Attention under a mask does
not care where a patch stands, so here a window is a number per patch (planned on the host, as
segments are), and nothing is moved or moved back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tte_jax.models.config import WindowedVisionConfig
from tte_jax.models.initial import Initial
from tte_jax.models.stack import run_layers
from tte_jax.models.vision import (
    AttentionBlocks,
    joined,
    merge,
    vision_attention,
    vision_rotary,
)
from tte_jax.nn.linear import project
from tte_jax.nn.norms import rms_norm

RMS_EPS = 1e-6  # fixed in the reference implementation


class WindowedBlocks(AttentionBlocks):
    """Blocks with RMS norms and a gated MLP."""

    def __init__(
        self, config: WindowedVisionConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype
    ) -> None:
        e, f = config.embed_dim, config.inner
        new = Initial(rngs, dtype, (config.depth,))
        super().__init__(config, new)
        self.gate_ef, self.gate_bias_f = new.normal(e, f), new.zeros(f)
        self.up_ef, self.up_bias_f = new.normal(e, f), new.zeros(f)
        self.down_fe, self.down_bias_e = new.residual(f, e), new.zeros(e)


class WindowedVisionTower(nnx.Module):
    """Patch embedding, windowed and full blocks, and the merger into text space."""

    def __init__(
        self, config: WindowedVisionConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        e, wide = config.embed_dim, config.embed_dim * config.merged
        new = Initial(rngs, dtype)
        self.patch_ce = new.normal(config.patch_values, e)
        self.blocks = WindowedBlocks(config, rngs=rngs, dtype=dtype)
        self.merge_norm_e = new.ones(e)
        self.merge1_gg, self.merge1_bias_g = new.normal(wide, wide), new.zeros(wide)
        self.merge2_gd = new.normal(wide, config.out_size)
        self.merge2_bias_d = new.zeros(config.out_size)

    def __call__(
        self,
        patches: Float[Array, "G P C"],
        hw: Int[Array, "G P 2"],
        segments: Int[Array, "G P"],
        windows: Int[Array, "G P"],
        *,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "G P/M D"]:
        """Encode G packs of P patches each; see `VisionTower`.

        Args:
          windows: one id per attention window, counted over the whole pack; 0 is padding.
        """
        c = self.config
        patches = patches.astype(self.merge_norm_e[...].dtype)
        x = project("gpc,ce->gpe", patches, self.patch_ce[...])
        cos, sin = vision_rotary(hw, c.embed_dim // c.heads)
        whole = segments[:, :, None] == segments[:, None, :]
        window = windows[:, :, None] == windows[:, None, :]
        full = jnp.asarray(np.isin(np.arange(c.depth), c.full_blocks))

        def block(x: Array, scanned: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
            w, is_full = scanned
            h = rms_norm(x, w["norm1_e"], RMS_EPS)
            x = x + vision_attention(h, w, cos, sin, jnp.where(is_full, whole, window))
            h = rms_norm(x, w["norm2_e"], RMS_EPS)
            gate = jax.nn.silu(project("gpe,ef->gpf", h, w["gate_ef"]) + w["gate_bias_f"])
            inner = gate * (project("gpe,ef->gpf", h, w["up_ef"]) + w["up_bias_f"])
            return x + project("gpf,fe->gpe", inner, w["down_fe"]) + w["down_bias_e"], None

        body = jax.checkpoint(block) if remat else block
        x, _ = run_layers(body, x, self.blocks.weights(), full, unroll=unroll)
        x = rms_norm(x, self.merge_norm_e[...], RMS_EPS)
        return merge(
            joined(x, c.embed_dim * c.merged),
            self.merge1_gg[...],
            self.merge1_bias_g[...],
            self.merge2_gd[...],
            self.merge2_bias_d[...],
        )
