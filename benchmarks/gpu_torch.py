"""The PyTorch side of `benchmarks.gpu`: the same shape in transformers, random weights too."""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import jax

from tte_jax.engine.inputs import ModelInput


class Prompt:
    """A sequence as the PyTorch side takes it."""

    def __init__(self, one: ModelInput) -> None:
        self.ids = one.ids
        self.images = [(image.patches, image.grid) for image in one.images]


def sides(raw: dict[str, Any]) -> Any:
    """The same shape in transformers on the same kind of device; None where that is not there."""
    if (
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("transformers") is None
    ):
        return None
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLConfig
    from transformers import Qwen2VLForConditionalGeneration as VisionLanguage

    from benchmarks.engine import reference

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where != ("cuda" if jax.default_backend() == "gpu" else "cpu"):
        return None  # a comparison of two machines says nothing of the engine
    text = {k: v for k, v in raw.items() if "token_id" not in k and k != "vision_config"}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    vl = Qwen2VLConfig(
        text_config={k: v for k, v in text.items() if k != "model_type"},
        vision_config=raw["vision_config"],
        **{k: v for k, v in raw.items() if "token_id" in k},
    )
    plain = {k: v for k, v in text.items() if k not in ("model_type", "rope_scaling")}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(where):
        sides = types.SimpleNamespace(
            vl=reference.VisionLanguage(VisionLanguage(vl)),
            text=reference.Text(Qwen2ForCausalLM(Qwen2Config(**plain)), 1, 2),
        )
    torch.set_default_dtype(torch.float32)
    return sides
