"""A decoder with an optional vision tower: the shape that all families here share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tte_jax.models.config import (
    DeepStackVisionConfig,
    ModelConfig,
    VisionConfig,
    WindowedVisionConfig,
)
from tte_jax.models.stack import Apart, turned_matrix
from tte_jax.models.text import KVCache, LayerCaches, TextDecoder
from tte_jax.models.vision import VisionTower
from tte_jax.models.vision_qwen2_5 import WindowedVisionTower
from tte_jax.models.vision_qwen3 import DeepStackVisionTower
from tte_jax.nn.linear import fold, lookup

TOWERS: dict[type[VisionConfig], Any] = {
    VisionConfig: VisionTower,
    WindowedVisionConfig: WindowedVisionTower,
    DeepStackVisionConfig: DeepStackVisionTower,
}


class MultimodalLM(nnx.Module):
    """Parameters and pure calls; holds no state. A plain pytree under `jax.jit`."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        self.text = TextDecoder(config.text, rngs=rngs, dtype=dtype)
        if config.vision is not None:
            self.visual = TOWERS[type(config.vision)](config.vision, rngs=rngs, dtype=dtype)

    def apart(self, *, turned: bool = False) -> MultimodalLM:
        """The same model and memory with every layer's weights as arrays of their own, see `stack`.

        Only for a model on one CPU device, and for inference.

        Args:
          turned: the decoder's matrices are copies with their outputs first (`TurnedWeight`).
        """
        copy = nnx.merge(*nnx.split(self))
        copy.text.layers = Apart(copy.text.layers, turned=turned)
        if turned and not copy.config.text.tied:
            copy.text.head_dv = nnx.Param(turned_matrix(copy.text.head_dv[...], inputs=1))
        if copy.config.vision is not None:
            copy.visual.blocks = Apart(copy.visual.blocks)
        return copy

    def encode_images(
        self,
        patches: Float[Array, "G P C"],
        *plan: Array,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "V W"]:
        """Vision features of G packs as one flat table, V = G * P / M.

        Args:
          plan: the arrays of `VisionPlan`, stacked over G; which ones depends on the tower.
        """
        out = self.visual(patches, *plan, remat=remat, unroll=unroll)
        return fold(out, -1, out.shape[-1])

    def forward(
        self,
        ids: Int[Array, "B T"],
        *,
        valid: Bool[Array, "B T"],
        positions: Int[Array, "B 3 T"],
        vis: Float[Array, "V W"] | None = None,
        vis_idx: Int[Array, "B T"] | None = None,
        prefix: KVCache | LayerCaches | None = None,
        recent: KVCache | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        at: Int[Array, "B J"] | None = None,
        remat: bool = False,
        unroll: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Hidden states after the final norm, and the new keys and values [L B T K H].

        Args:
          ids: token ids; at vision tokens the id is ignored.
          valid: False at padding.
          positions: int32 position rows (time, height, width).
          vis: table of vision features, or None for text only; behind the D values of the
            embedding come those that DeepStack adds, D for each of the first text layers.
          vis_idx: row of `vis` for each token, -1 at text.
          prefix: cache of earlier tokens.
          recent: of those between `prefix` and the new ones.
          mask: which new token sees which; None = causal over the valid ones.
          segments: the sequence of each token where several share a row, see `TextDecoder`.
          at: the few places whose hidden states are wanted; the result then is [B J D].
          remat: trade compute for memory in the backward pass.
          unroll: compile every layer apart; a backward pass on CPU is a sixth faster.
        """
        x, deep = self.text.embed(ids), None
        if vis is not None and vis_idx is not None:
            features = lookup(vis, jnp.maximum(vis_idx, 0)).astype(x.dtype)
            here, width = (vis_idx >= 0)[..., None], x.shape[-1]
            x = jnp.where(here, features[..., :width], x)
            if vis.shape[-1] > width:
                rest = jnp.where(here, features[..., width:], 0)
                deep = jnp.moveaxis(fold(rest, *x.shape[:2], -1, width), 2, 0)
        return self.text(
            x,
            positions=positions,
            valid=valid,
            prefix=prefix,
            recent=recent,
            mask=mask,
            segments=segments,
            deep=deep,
            at=at,
            remat=remat,
            unroll=unroll,
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        return self.text.logits(hidden)
