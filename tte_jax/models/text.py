"""The text decoder of Qwen2, Qwen2-VL and Qwen3: pre-norm, grouped-query attention, SwiGLU.

Layers are stacked: every weight has a leading L axis and `jax.lax.scan` runs over it, so a model
has a dozen leaves whatever its depth (dispatch cost is per leaf) and compiles one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tte_jax.models.config import TextConfig
from tte_jax.models.initial import Initial
from tte_jax.models.stack import Apart, PerLayer, Stack, one_of, run_layers
from tte_jax.nn.attention import Prefix, attend
from tte_jax.nn.linear import TurnedWeight, Weight, columns, lookup, project
from tte_jax.nn.norms import rms_norm
from tte_jax.nn.places import at_places
from tte_jax.nn.rotary import frequencies, rotary_tables, rotate


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of earlier tokens; a plain pytree.

    Attributes:
      k, v: [L B S K H]; B may be 1 for a prefix that a whole batch shares.
      length: [B] int32, how many of the S places are filled. Places from `length` on are ignored,
        whatever they hold.
    """

    k: Array
    v: Array
    length: Array

    @property
    def places(self) -> int:
        """S."""
        return self.k.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerCaches:
    """A `KVCache` for layers apart, read and never written: k and v are [B S K H] of each layer."""

    k: PerLayer
    v: PerLayer
    length: Array

    @property
    def places(self) -> int:
        """S."""
        return self.k[0].shape[1]


class DecoderLayers(Stack):
    """The stacked layers' weights. Names end in their dimensions, after the leading L."""

    matrices: ClassVar[dict[str, int]] = {
        "q_dnh": 1, "k_dkh": 1, "v_dkh": 1, "o_nhd": 2, "gate_df": 1, "up_df": 1, "down_fd": 1,
    }  # fmt: skip

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype) -> None:
        c, new = config, Initial(rngs, dtype, (config.layers,))
        self.attn_norm_d = new.ones(c.hidden_size)
        self.q_dnh = new.normal(c.hidden_size, c.heads, c.head_dim)
        self.k_dkh = new.normal(c.hidden_size, c.kv_heads, c.head_dim)
        self.v_dkh = new.normal(c.hidden_size, c.kv_heads, c.head_dim)
        if c.qkv_bias:
            self.q_bias_nh = new.zeros(c.heads, c.head_dim)
            self.k_bias_kh = new.zeros(c.kv_heads, c.head_dim)
            self.v_bias_kh = new.zeros(c.kv_heads, c.head_dim)
        if c.qk_norm:
            self.q_norm_h = new.ones(c.head_dim)
            self.k_norm_h = new.ones(c.head_dim)
        self.o_nhd = new.residual(c.heads, c.head_dim, c.hidden_size)
        self.mlp_norm_d = new.ones(c.hidden_size)
        self.gate_df = new.normal(c.hidden_size, c.intermediate_size)
        self.up_df = new.normal(c.hidden_size, c.intermediate_size)
        self.down_fd = new.residual(c.intermediate_size, c.hidden_size)


class TextDecoder(nnx.Module):
    """Embedding table, stacked layers, final norm and output head."""

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        shape, new = (config.vocab_size, config.hidden_size), Initial(rngs, dtype)
        self.embed_vd = new.normal(*shape)
        self.layers: Stack = DecoderLayers(config, rngs=rngs, dtype=dtype)
        self.norm_d = new.ones(config.hidden_size)
        if not config.tied:
            self.head_dv = new.normal(*shape[::-1])

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        return lookup(self.embed_vd[...], ids)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B 3 T"],
        valid: Bool[Array, "B T"],
        prefix: KVCache | LayerCaches | None = None,
        recent: KVCache | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        deep: Float[Array, "K B T D"] | None = None,
        at: Int[Array, "B J"] | None = None,
        remat: bool = False,
        unroll: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Run all layers, causally.

        Args:
          x: embedded tokens (vision features already in place).
          positions: int32 position rows (time, height, width); equal rows for text.
          valid: False at padding, which may stand on either side or anywhere between.
          prefix: earlier tokens that every new token may look at.
          recent: more of them, between `prefix` and the new tokens.
          mask: which new token sees which; None = causal over the valid ones.
          segments: where several sequences share a row, the one that each token belongs to;
            tokens see those of their own only, and a sequence's result is the same to the bit
            wherever it stands. Not beside `prefix`.
          deep: what is added after each of the first K layers (DeepStack; 0 at text).
          at: the places whose states are wanted, when these are few: of the last layer, only
            keys and values are computed for the others. The result then is [B J D].
          remat: recompute layers in the backward pass instead of keeping their activations.
          unroll: compile every layer apart; a backward pass on CPU is a sixth faster.

        Returns:
          Hidden states after the final norm, and the new keys and values, each [L B T K H]
          (rotated, ready to be put in a cache).
        """
        c = self.config
        cos, sin = rotary_tables(positions, c.rope_axes, frequencies(c.head_dim, c.rope_theta))
        length = x.shape[1]
        if mask is None:
            mask = jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        before = [part for part in (prefix, recent) if part is not None]
        filled = [
            (jnp.arange(part.places)[None, :] < part.length[:, None])[:, None, :] for part in before
        ]

        def layer(
            x: Array, scanned: tuple, only: Callable[[Array], Array] = lambda x: x
        ) -> tuple[Array, tuple[Array, Array]]:
            w, (earlier, index) = scanned
            h = rms_norm(x, w["attn_norm_d"], c.rms_eps)
            k = project("btd,dkh->btkh", h, w["k_dkh"])
            v = project("btd,dkh->btkh", h, w["v_dkh"])
            x, h = only(x), only(h)
            q = project("btd,dnh->btnh", h, w["q_dnh"])
            if c.qkv_bias:
                q, k, v = q + w["q_bias_nh"], k + w["k_bias_kh"], v + w["v_bias_kh"]
            if c.qk_norm:
                q = rms_norm(q, w["q_norm_h"], c.rms_eps)
                k = rms_norm(k, w["k_norm_h"], c.rms_eps)
            q, k = rotate(q, only(cos), only(sin)), rotate(k, cos, sin)
            if q.shape[1] != length:
                # Fused with a product of few rows, the first one's last bit is another (JAX 0.12).
                q = jax.lax.optimization_barrier(q)
            parts = [Prefix(ks, vs, has) for (ks, vs), has in zip(earlier, filled, strict=True)]
            packed = segments is not None
            out = attend(q, k, v, mask=only(mask), prefix=parts, packed=packed)
            x = x + project("btnh,nhd->btd", out, w["o_nhd"])
            h = rms_norm(x, w["mlp_norm_d"], c.rms_eps)
            gate = jax.nn.silu(project("btd,df->btf", h, w["gate_df"]))
            inner = gate * project("btd,df->btf", h, w["up_df"])
            x = x + project("btf,fd->btd", inner, w["down_fd"])
            if deep is not None:
                more = jax.lax.dynamic_index_in_dim(deep, index, keepdims=False)
                x = x + jnp.where(index < len(deep), only(more), 0)
            return x, (k, v)

        body = jax.checkpoint(layer) if remat else layer
        earlier = [(part.k, part.v) for part in before]
        index = None if deep is None else jnp.arange(c.layers)
        weights, more = self.layers.weights(), (earlier, index)
        if at is None:
            x, kv = run_layers(body, x, weights, more, unroll=unroll)
        else:
            last = c.layers - 1
            x, kv = run_layers(body, x, weights, more, count=last, unroll=unroll)
            scanned = one_of(weights, last), jax.tree.map(lambda m: m[last], more)
            x, own = layer(x, scanned, partial(at_places, places=at))
            kv = jax.tree.map(lambda m, one: jnp.concatenate([m, one[None]]), kv, own)
        return rms_norm(x, self.norm_d[...], c.rms_eps), kv

    def head(self) -> Weight:
        """The output matrix [D V]; the transposed embedding table when tied."""
        if not self.config.tied:
            return self.head_dv[...]
        table = self.embed_vd[...]
        # Layers apart are those of a CPU, where few rows at a time become logits.
        return TurnedWeight(table) if isinstance(self.layers, Apart) else table.T

    def head_rows(self, ids: tuple[int, ...]) -> Float[Array, "C D"]:
        """What the output head holds for a few tokens, in float32, whole on every device."""
        which = jnp.asarray(ids)
        if self.config.tied:
            return lookup(self.embed_vd[...], which).astype(jnp.float32)
        return columns(self.head_dv[...], which).T

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        letters = "abcefg"[: hidden.ndim - 1]
        return project(f"{letters}d,dv->{letters}v", hidden, self.head(), dtype=jnp.float32)
