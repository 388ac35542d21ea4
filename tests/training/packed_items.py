"""Random sequences with and without images for the tests of the trainers' programs."""

from __future__ import annotations

import numpy as np

from tte_jax.engine.inputs import ImageInput, ModelInput, model_input
from tte_jax.models.config import ModelConfig
from tte_jax.preprocess.template import Prompt


def inputs(
    config: ModelConfig, count: int, *, seed: int = 0, longest: int = 14
) -> list[ModelInput]:
    """`count` sequences of 4 to `longest` tokens; every third has an image, if the model sees."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        # Below the control tokens, which the byte alphabet and the merges precede.
        ids = rng.integers(20, 250, rng.integers(4, longest + 1)).tolist()
        images: list[ImageInput] = []
        if config.vision is not None and number % 3 == 0:
            rows, columns = (2, 4) if number % 2 else (2, 2)
            patches = rng.standard_normal((rows * columns, config.vision.patch_values))
            images = [
                ImageInput(f"{seed}-{number}", patches.astype(np.float32), (1, rows, columns))
            ]
            pads = [config.image_token_id] * (rows * columns // config.vision.merged)
            ids = [config.vision_start_token_id, *pads, *ids[: longest - len(pads) - 1]]
        prompt = Prompt(
            np.array(ids, np.int32),
            tuple((i.patches, i.grid) for i in images),
            tuple(i.key for i in images),
            tuple(0.0 for _ in images),
        )
        made.append(model_input(prompt, config))
    return made
