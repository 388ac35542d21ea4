"""The one table between Hugging Face tensor names and our parameters, used both ways.

A linear weight is stored [out, in...] by PyTorch and [in, out] here, with either side split into
its own dimensions (`q_dnh`: in = D, out = N x H). One rule covers them all:

    ours = hf.reshape(out, in).T.reshape(our shape)

so an entry only says which of our leading dimensions are the input side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tte_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      path: attribute path in our module, dotted.
      name: name in the file, after prefix normalisation; `{l}` stands for the layer.
      inputs: how many leading dimensions of ours (after L) are the input side of a linear weight;
        0 = stored as it is, only reshaped.
      hf_shape: shape in the file.
    """

    path: str
    name: str
    inputs: int
    hf_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return "{l}" in self.name

    def to_jax(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One layer's tensor as in the file → our layout `shape` (without L)."""
        if self.inputs:
            value = value.reshape(value.shape[0], -1).T
        return value.reshape(shape)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_jax`."""
        if self.inputs:
            rows = int(np.prod(value.shape[: self.inputs]))
            value = value.reshape(rows, -1).T
        return np.ascontiguousarray(value.reshape(self.hf_shape))


def entries(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model, in file order."""
    return [*_text(config), *(_qwen2_vision(config) if config.vision else ())]


def _text(config: ModelConfig) -> Iterator[Entry]:
    c = config.text
    d, f, q, kv = (
        c.hidden_size,
        c.intermediate_size,
        c.heads * c.head_dim,
        c.kv_heads * c.head_dim,
    )
    layer, ours = "model.layers.{l}.", "text.layers."
    yield Entry("text.embed_vd", "model.embed_tokens.weight", 0, (c.vocab_size, d))
    yield Entry(ours + "attn_norm_d", layer + "input_layernorm.weight", 0, (d,))
    yield Entry(ours + "q_dnh", layer + "self_attn.q_proj.weight", 1, (q, d))
    yield Entry(ours + "k_dkh", layer + "self_attn.k_proj.weight", 1, (kv, d))
    yield Entry(ours + "v_dkh", layer + "self_attn.v_proj.weight", 1, (kv, d))
    if c.qkv_bias:
        yield Entry(ours + "q_bias_nh", layer + "self_attn.q_proj.bias", 0, (q,))
        yield Entry(ours + "k_bias_kh", layer + "self_attn.k_proj.bias", 0, (kv,))
        yield Entry(ours + "v_bias_kh", layer + "self_attn.v_proj.bias", 0, (kv,))
    if c.qk_norm:
        yield Entry(ours + "q_norm_h", layer + "self_attn.q_norm.weight", 0, (c.head_dim,))
        yield Entry(ours + "k_norm_h", layer + "self_attn.k_norm.weight", 0, (c.head_dim,))
    yield Entry(ours + "o_nhd", layer + "self_attn.o_proj.weight", 2, (d, q))
    yield Entry(ours + "mlp_norm_d", layer + "post_attention_layernorm.weight", 0, (d,))
    yield Entry(ours + "gate_df", layer + "mlp.gate_proj.weight", 1, (f, d))
    yield Entry(ours + "up_df", layer + "mlp.up_proj.weight", 1, (f, d))
    yield Entry(ours + "down_fd", layer + "mlp.down_proj.weight", 1, (d, f))
    yield Entry("text.norm_d", "model.norm.weight", 0, (d,))
    if not c.tied:
        yield Entry("text.head_dv", "lm_head.weight", 1, (c.vocab_size, d))


def _qwen2_vision(config: ModelConfig) -> Iterator[Entry]:
    c = config.vision
    assert c is not None
    e, f, wide = c.embed_dim, int(c.embed_dim * c.mlp_ratio), c.embed_dim * c.merged
    conv = (e, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    block, ours = "visual.blocks.{l}.", "visual.blocks."
    yield Entry("visual.patch_ce", "visual.patch_embed.proj.weight", 1, conv)
    yield Entry(ours + "norm1_e", block + "norm1.weight", 0, (e,))
    yield Entry(ours + "norm1_bias_e", block + "norm1.bias", 0, (e,))
    yield Entry(ours + "qkv_e3nh", block + "attn.qkv.weight", 1, (3 * e, e))
    yield Entry(ours + "qkv_bias_3nh", block + "attn.qkv.bias", 0, (3 * e,))
    yield Entry(ours + "o_nhe", block + "attn.proj.weight", 2, (e, e))
    yield Entry(ours + "o_bias_e", block + "attn.proj.bias", 0, (e,))
    yield Entry(ours + "norm2_e", block + "norm2.weight", 0, (e,))
    yield Entry(ours + "norm2_bias_e", block + "norm2.bias", 0, (e,))
    yield Entry(ours + "fc1_ef", block + "mlp.fc1.weight", 1, (f, e))
    yield Entry(ours + "fc1_bias_f", block + "mlp.fc1.bias", 0, (f,))
    yield Entry(ours + "fc2_fe", block + "mlp.fc2.weight", 1, (e, f))
    yield Entry(ours + "fc2_bias_e", block + "mlp.fc2.bias", 0, (e,))
    yield Entry("visual.merge_norm_e", "visual.merger.ln_q.weight", 0, (e,))
    yield Entry("visual.merge_norm_bias_e", "visual.merger.ln_q.bias", 0, (e,))
    yield Entry("visual.merge1_gg", "visual.merger.mlp.0.weight", 1, (wide, wide))
    yield Entry("visual.merge1_bias_g", "visual.merger.mlp.0.bias", 0, (wide,))
    yield Entry("visual.merge2_gd", "visual.merger.mlp.2.weight", 1, (c.out_size, wide))
    yield Entry("visual.merge2_bias_d", "visual.merger.mlp.2.bias", 0, (c.out_size,))


def normalise(name: str) -> str:
    """File name → table name. `save_pretrained` and in-memory dumps differ only in prefixes."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)
