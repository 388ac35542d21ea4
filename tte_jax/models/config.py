"""Architecture configurations, read from a Hugging Face `config.json`.

Nothing has a silent default: a key that the architecture needs and the file lacks is an error that
names it. Files of transformers 4 (flat, `rope_scaling`) and 5 (nested, `rope_parameters`) are both
understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tte_jax.errors import NotFoundError, PreconditionError
from tte_jax.models.files import read_json


@dataclass(frozen=True)
class TextConfig:
    """The text decoder.

    Attributes:
      rope_axes: for each of the head_dim/2 rotary frequencies the position axis it reads
        (0 time or text, 1 height, 2 width).
      qkv_bias: biases on q, k and v (Qwen2 yes, Qwen3 no).
      qk_norm: RMS norm on each query and key head (Qwen3).
      tied: the output head is the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_axes: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool
    tied: bool


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision tower."""

    depth: int
    embed_dim: int
    heads: int
    mlp_ratio: float
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_size: int

    @property
    def patch_values(self) -> int:
        """C: values in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """M: patches per vision token."""
        return self.merge_size**2

    @property
    def inner(self) -> int:
        """F: width of the blocks' MLP (rounded: the ratio may be a quotient of two widths)."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def feature_size(self) -> int:
        """Values in one row of vision features, as the text decoder takes them."""
        return self.out_size

    @property
    def plan(self) -> dict[str, int]:
        """What `plan_vision` must know of the tower."""
        return {"merge_size": self.merge_size}


@dataclass(frozen=True)
class WindowedVisionConfig(VisionConfig):
    """The Qwen2.5-VL vision tower.

    Attributes:
      window_size: side of an attention window, pixels.
      full_blocks: the blocks that attend to their whole frame.
      tokens_per_second: time positions per second of video.
    """

    window_size: int
    full_blocks: tuple[int, ...]
    tokens_per_second: float

    @property
    def plan(self) -> dict[str, int]:
        # The reference divides in this order; a window is a whole number of merge blocks.
        blocks = self.window_size // self.merge_size // self.patch_size
        return {"merge_size": self.merge_size, "window": blocks * self.merge_size}


@dataclass(frozen=True)
class DeepStackVisionConfig(VisionConfig):
    """The Qwen3-VL vision tower.

    Attributes:
      table_side: the learned position table has this many rows and columns.
      deepstack_blocks: the blocks whose output is merged and added after text layers 0, 1, ...
    """

    table_side: int
    deepstack_blocks: tuple[int, ...]

    @property
    def feature_size(self) -> int:
        return self.out_size * (1 + len(self.deepstack_blocks))

    @property
    def plan(self) -> dict[str, int]:
        return {"merge_size": self.merge_size, "table_side": self.table_side}


@dataclass(frozen=True)
class ModelConfig:
    """One model: its family, its parts and its special token ids (None where it has none)."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def feature_size(self) -> int:
        """W: values in one row of the table of vision features."""
        return self.text.hidden_size if self.vision is None else self.vision.feature_size


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
      NotFoundError: the directory or the file is missing.
      PreconditionError: the file is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise NotFoundError(
            f"No model at {str(directory)!r}: expected a directory with config.json, tokenizer.json"
            " and *.safetensors. Pass a Hugging Face model directory.",
            reason="MODEL_NOT_FOUND",
            path=directory,
        )
    return read_json(path, reason="MODEL_CONFIG_INVALID")


def eos_ids(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Stop tokens: `generation_config.json` first, else `config.json`; one id or a list."""
    for source in (generation or {}, raw, raw.get("text_config") or {}):
        value = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def text_config(
    raw: Mapping[str, Any],
    *,
    qkv_bias: bool,
    qk_norm: bool,
    sections: bool,
    tied: bool,
    interleaved: bool = False,
) -> TextConfig:
    """Parse the text part.

    Args:
      sections: the family uses M-RoPE sections.
      interleaved: time, height and width take turns over the frequencies (Qwen3-VL) instead of
        standing one after another.
    """
    need = _Reader(raw, "text configuration")
    heads = need("num_attention_heads")
    hidden = need("hidden_size")
    head_dim = raw.get("head_dim") or hidden // heads
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    if theta is None:
        raise PreconditionError(
            "The text configuration has no rope_theta (looked in rope_parameters and at the top).",
            reason="MODEL_CONFIG_INVALID",
        )
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise PreconditionError(
            f"Rotary scaling {kind!r} is not supported; expected 'default' or 'mrope'.",
            reason="MODEL_CONFIG_UNSUPPORTED",
        )
    if sections:
        lengths = rope.get("mrope_section") or scaling.get("mrope_section")
        if not lengths or sum(lengths) != head_dim // 2:
            raise PreconditionError(
                f"mrope_section must be three numbers that sum to head_dim/2 = {head_dim // 2};"
                f" got {lengths}.",
                reason="MODEL_CONFIG_INVALID",
            )
        axes = tuple(axis for axis, n in enumerate(lengths) for _ in range(n))
        if interleaved:
            turns = [0] * (head_dim // 2)  # THWTHW...TT: what is left over goes to time
            for axis in (1, 2):
                turns[axis : 3 * lengths[axis] : 3] = [axis] * len(
                    turns[axis : 3 * lengths[axis] : 3]
                )
            axes = tuple(turns)
    else:
        axes = (0,) * (head_dim // 2)
    if raw.get("hidden_act", "silu") != "silu":
        raise PreconditionError(
            f"hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'.",
            reason="MODEL_CONFIG_UNSUPPORTED",
        )
    if raw.get("use_sliding_window"):
        raise PreconditionError(
            "use_sliding_window is true; only full attention is supported.",
            reason="MODEL_CONFIG_UNSUPPORTED",
        )
    return TextConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        layers=need("num_hidden_layers"),
        heads=heads,
        kv_heads=need("num_key_value_heads"),
        head_dim=head_dim,
        rms_eps=need("rms_norm_eps"),
        rope_theta=float(theta),
        rope_axes=axes,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=tied,
    )


class _Reader:
    """Reads required keys and names the missing one."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def __call__(self, key: str, *alternatives: str) -> Any:
        for name in (key, *alternatives):
            if self._raw.get(name) is not None:
                return self._raw[name]
        raise PreconditionError(
            f"The {self._where} in config.json lacks {key!r}.",
            reason="MODEL_CONFIG_INVALID",
            key=key,
        )


def required(raw: Mapping[str, Any], where: str) -> _Reader:
    """A reader of required keys; missing ones raise PreconditionError."""
    return _Reader(raw, where)
