"""Families by Hugging Face `model_type`.

To add one: a module here that parses its `config.json`, its weight table in
`tte_jax.weights.table`, and a parity test in `tests/models/`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tte_jax.errors import PreconditionError
from tte_jax.models import qwen2_vl, qwen3
from tte_jax.models.config import ModelConfig, read_config

FAMILIES = {"qwen2_vl": qwen2_vl.parse, "qwen3": qwen3.parse}


def model_config(directory: str | Path) -> ModelConfig:
    """The configuration of the model in `directory`.

    Raises:
      NotFoundError: no `config.json` there.
      PreconditionError: an unknown family, or a configuration with missing or unsupported keys.
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
    generation = json.loads(path.read_text()) if path.is_file() else None
    return FAMILIES[family](raw, generation)
