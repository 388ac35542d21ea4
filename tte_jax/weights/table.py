"""The one table between Hugging Face tensor names and our parameters, used both ways.

A linear weight is stored [out, in...] by PyTorch and [in, out] here, with either side split into
its own dimensions (`q_dnh`: in = D, out = N x H). One rule covers them all:

    ours = hf.reshape(out, in).T.reshape(our shape)

so an entry only says which of our leading dimensions are the input side. `Entry.matrix` is that
rule, backwards, as a view: loading fills it from the file, a part at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np

from tte_jax.models.config import (
    DeepStackVisionConfig,
    ModelConfig,
    VisionConfig,
    WindowedVisionConfig,
)

T = TypeVar("T")


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

    def sides(self, ours: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """What belongs to each of our dimensions (without L), sorted into the rows and the columns
        of the file's matrix."""
        if self.inputs:
            return ours[self.inputs :], ours[: self.inputs]
        rows = 1 if len(self.hf_shape) > 1 else len(ours)
        return ours[:rows], ours[rows:]

    def matrix(self, value: np.ndarray) -> np.ndarray:
        """One layer in our layout, or a part of it, as the file's matrix [rows, columns]; a view
        where `value` is contiguous."""
        rows, columns = (prod(side) for side in self.sides(value.shape))
        return value.reshape(columns, rows).T if self.inputs else value.reshape(rows, columns)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """One layer in our layout → the tensor in the file."""
        return np.ascontiguousarray(self.matrix(value)).reshape(self.hf_shape)


def entries(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model, in file order."""
    vision = config.vision
    return [*_text(config), *(_VISION[type(vision)](vision) if vision else ())]


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


def _vision_attention(c: VisionConfig) -> Iterator[Entry]:
    """Patch embedding, norms' weights and attention, which all towers share."""
    e = c.embed_dim
    conv = (e, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    block, ours = "visual.blocks.{l}.", "visual.blocks."
    yield Entry("visual.patch_ce", "visual.patch_embed.proj.weight", 1, conv)
    yield Entry(ours + "norm1_e", block + "norm1.weight", 0, (e,))
    yield Entry(ours + "qkv_e3nh", block + "attn.qkv.weight", 1, (3 * e, e))
    yield Entry(ours + "qkv_bias_3nh", block + "attn.qkv.bias", 0, (3 * e,))
    yield Entry(ours + "o_nhe", block + "attn.proj.weight", 2, (e, e))
    yield Entry(ours + "o_bias_e", block + "attn.proj.bias", 0, (e,))
    yield Entry(ours + "norm2_e", block + "norm2.weight", 0, (e,))


def _layer_norm_mlp(c: VisionConfig, fc1: str, fc2: str) -> Iterator[Entry]:
    """The norms' biases and the two-matrix MLP of Qwen2-VL and Qwen3-VL."""
    e, f = c.embed_dim, c.inner
    block, ours = "visual.blocks.{l}.", "visual.blocks."
    yield Entry(ours + "norm1_bias_e", block + "norm1.bias", 0, (e,))
    yield Entry(ours + "norm2_bias_e", block + "norm2.bias", 0, (e,))
    yield Entry(ours + "fc1_ef", block + f"mlp.{fc1}.weight", 1, (f, e))
    yield Entry(ours + "fc1_bias_f", block + f"mlp.{fc1}.bias", 0, (f,))
    yield Entry(ours + "fc2_fe", block + f"mlp.{fc2}.weight", 1, (e, f))
    yield Entry(ours + "fc2_bias_e", block + f"mlp.{fc2}.bias", 0, (e,))


def _qwen2_vision(c: VisionConfig) -> Iterator[Entry]:
    yield from _vision_attention(c)
    yield from _layer_norm_mlp(c, "fc1", "fc2")
    yield Entry("visual.merge_norm_bias_e", "visual.merger.ln_q.bias", 0, (c.embed_dim,))
    yield from _qwen2_merger(c)


def _windowed_vision(c: VisionConfig) -> Iterator[Entry]:
    e, f = c.embed_dim, c.inner
    block, ours = "visual.blocks.{l}.mlp.", "visual.blocks."
    yield from _vision_attention(c)
    yield Entry(ours + "gate_ef", block + "gate_proj.weight", 1, (f, e))
    yield Entry(ours + "gate_bias_f", block + "gate_proj.bias", 0, (f,))
    yield Entry(ours + "up_ef", block + "up_proj.weight", 1, (f, e))
    yield Entry(ours + "up_bias_f", block + "up_proj.bias", 0, (f,))
    yield Entry(ours + "down_fe", block + "down_proj.weight", 1, (e, f))
    yield Entry(ours + "down_bias_e", block + "down_proj.bias", 0, (e,))
    yield from _qwen2_merger(c)


def _deepstack_vision(c: VisionConfig) -> Iterator[Entry]:
    assert isinstance(c, DeepStackVisionConfig)
    e, wide = c.embed_dim, c.embed_dim * c.merged
    yield from _vision_attention(c)
    yield Entry("visual.patch_bias_e", "visual.patch_embed.proj.bias", 0, (e,))
    yield Entry("visual.table_se", "visual.pos_embed.weight", 0, (c.table_side**2, e))
    yield from _layer_norm_mlp(c, "linear_fc1", "linear_fc2")
    mergers = [("visual.merger.", "visual.merger.", e)]
    for i in range(len(c.deepstack_blocks)):
        mergers.append((f"visual.deepstack{i}.", f"visual.deepstack_merger_list.{i}.", wide))
    for ours, file, size in mergers:
        yield Entry(ours + "norm_e", file + "norm.weight", 0, (size,))
        yield Entry(ours + "norm_bias_e", file + "norm.bias", 0, (size,))
        yield Entry(ours + "fc1_gg", file + "linear_fc1.weight", 1, (wide, wide))
        yield Entry(ours + "fc1_bias_g", file + "linear_fc1.bias", 0, (wide,))
        yield Entry(ours + "fc2_gd", file + "linear_fc2.weight", 1, (c.out_size, wide))
        yield Entry(ours + "fc2_bias_d", file + "linear_fc2.bias", 0, (c.out_size,))


def _qwen2_merger(c: VisionConfig) -> Iterator[Entry]:
    e, wide = c.embed_dim, c.embed_dim * c.merged
    yield Entry("visual.merge_norm_e", "visual.merger.ln_q.weight", 0, (e,))
    yield Entry("visual.merge1_gg", "visual.merger.mlp.0.weight", 1, (wide, wide))
    yield Entry("visual.merge1_bias_g", "visual.merger.mlp.0.bias", 0, (wide,))
    yield Entry("visual.merge2_gd", "visual.merger.mlp.2.weight", 1, (c.out_size, wide))
    yield Entry("visual.merge2_bias_d", "visual.merger.mlp.2.bias", 0, (c.out_size,))


_VISION: dict[type[VisionConfig], Callable[[VisionConfig], Iterator[Entry]]] = {
    VisionConfig: _qwen2_vision,
    WindowedVisionConfig: _windowed_vision,
    DeepStackVisionConfig: _deepstack_vision,
}


def on_disk(name: str, model_type: str) -> str:
    """Table name → the name that the authors' files and transformers' `save_pretrained` have."""
    if model_type != "qwen3_vl":
        return name
    return re.sub(r"^(?=visual\.)", "model.", re.sub(r"^model\.", "model.language_model.", name))


def normalise(name: str) -> str:
    """File name → table name. `save_pretrained` and in-memory dumps differ only in prefixes."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)
