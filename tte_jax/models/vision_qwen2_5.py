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
from tte_jax.models.vision import vision_attention, vision_rotary
from tte_jax.nn.linear import fold, project
from tte_jax.nn.norms import rms_norm

RMS_EPS = 1e-6  # fixed in the reference implementation


class WindowedBlocks(nnx.Module):
    """The stacked blocks' weights, each with a leading L axis."""

    def __init__(self, config: WindowedVisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        n, e, f = config.depth, config.embed_dim, config.inner
        head = e // config.heads

        def normal(*shape: int, scale: float = 0.02) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), (n, *shape), dtype))

        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((n, *shape), dtype))

        small = 0.02 / (2 * n) ** 0.5
        self.norm1_e = nnx.Param(jnp.ones((n, e), dtype))
        self.qkv_e3nh = normal(e, 3, config.heads, head)
        self.qkv_bias_3nh = zeros(3, config.heads, head)
        self.o_nhe, self.o_bias_e = normal(config.heads, head, e, scale=small), zeros(e)
        self.norm2_e = nnx.Param(jnp.ones((n, e), dtype))
        self.gate_ef, self.gate_bias_f = normal(e, f), zeros(f)
        self.up_ef, self.up_bias_f = normal(e, f), zeros(f)
        self.down_fe, self.down_bias_e = normal(f, e, scale=small), zeros(e)

    def weights(self) -> dict[str, Array]:
        return {k: v[...] for k, v in vars(self).items() if isinstance(v, nnx.Param)}


class WindowedVisionTower(nnx.Module):
    """Patch embedding, windowed and full blocks, and the merger into text space."""

    def __init__(
        self, config: WindowedVisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        e, wide = config.embed_dim, config.embed_dim * config.merged

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

        self.patch_ce = normal(config.patch_values, e)
        self.blocks = WindowedBlocks(config, rngs=rngs, dtype=dtype)
        self.merge_norm_e = nnx.Param(jnp.ones((e,), dtype))
        self.merge1_gg = normal(wide, wide)
        self.merge1_bias_g = nnx.Param(jnp.zeros((wide,), dtype))
        self.merge2_gd = normal(wide, config.out_size)
        self.merge2_bias_d = nnx.Param(jnp.zeros((config.out_size,), dtype))

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
        x, _ = jax.lax.scan(body, x, (self.blocks.weights(), full), unroll=unroll)
        x = rms_norm(x, self.merge_norm_e[...], RMS_EPS)
        x = fold(x, x.shape[0], -1, c.embed_dim * c.merged)
        x = project("gpi,io->gpo", x, self.merge1_gg[...]) + self.merge1_bias_g[...]
        x = jax.nn.gelu(x, approximate=False)
        return project("gpi,id->gpd", x, self.merge2_gd[...]) + self.merge2_bias_d[...]
