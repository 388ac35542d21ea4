"""Families by Hugging Face `model_type`.

To add one:

1. A module here whose `parse` reads its `config.json`, and a line in `FAMILIES`. Text decoders
   differ by flags of `TextConfig` only (biases, q/k norms, which axis a frequency reads).
2. A new kind of vision tower: a subclass of `VisionConfig` whose `plan` says what the host works
   out (`tte_jax.preprocess.vision_plan`; a new array is one more argument of the tower), its
   module, and a line in `TOWERS` of `tte_jax.models.multimodal`.
3. Its weights in `tte_jax.weights.table`, the one table for loading and export.
4. A tiny checkpoint made by transformers in `tests/models/conftest.py`; the parity tests run it.

The engine serves whatever has these: it takes the shapes of the host's arrays from the plan.
"""

from __future__ import annotations

from pathlib import Path

from tte_jax.errors import PreconditionError
from tte_jax.models import qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_vl
from tte_jax.models.config import ModelConfig, read_config
from tte_jax.models.files import read_json

FAMILIES = {
    "qwen2": qwen2.parse,
    "qwen2_vl": qwen2_vl.parse,
    "qwen2_5_vl": qwen2_5_vl.parse,
    "qwen3": qwen3.parse,
    "qwen3_vl": qwen3_vl.parse,
}


def model_config(directory: str | Path) -> ModelConfig:
    """The configuration of the model in `directory`.

    Raises:
      NotFoundError: no `config.json` there.
      PreconditionError: an unknown family, a configuration with missing or unsupported keys, or a
        file that is not a JSON object.
    """
    directory = Path(directory)
    raw = read_config(directory)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise PreconditionError(
            f"{str(directory)!r} holds a {family!r} model; supported families: "
            f"{', '.join(sorted(FAMILIES))}.",
            reason="MODEL_FAMILY_UNSUPPORTED",
            model_type=family,
        )
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else None
    return FAMILIES[family](raw, generation)
