from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_resize,
)

from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError, UnsupportedError
from tte_jax.preprocess.patches import ImageConfig, patchify, smart_resize
from tte_jax.preprocess.video_config import VideoConfig


def image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (3, 400), (28, 28), (57, 43), (333, 61), (900, 1400), (1800, 40)]
)
def test_bit_for_bit_as_the_reference(width: int, height: int) -> None:
    size = {"shortest_edge": 3136, "longest_edge": 300 * 784}
    reference = Qwen2VLImageProcessorPil(size=size)
    config = ImageConfig(max_pixels=300 * 784)
    picture = image(width, height)
    expected = reference(images=[picture], return_tensors="np")
    patches, grid = patchify(picture, config)
    assert patches.dtype == np.float32
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    assert config.tokens(grid) * 4 == len(patches)


@pytest.mark.parametrize(("width", "height"), [(20, 20), (333, 61), (700, 900)])
def test_bit_for_bit_with_the_values_of_qwen3_vl(tmp_path: Path, width: int, height: int) -> None:
    """The published file of Qwen3-VL, its limits made smaller."""
    raw = {
        "size": {"longest_edge": 400 * 1024, "shortest_edge": 4 * 1024},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    reference = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path))
    expected = reference(images=[image(width, height)], return_tensors="np")
    patches, grid = patchify(image(width, height), ImageConfig.from_dir(tmp_path))
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    np.testing.assert_array_equal(patches, expected["pixel_values"])


def test_other_sizes_and_statistics() -> None:
    settings = {
        "patch_size": 8,
        "temporal_patch_size": 3,
        "merge_size": 3,
        "size": {"shortest_edge": 576, "longest_edge": 9216},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.25],
    }
    expected = Qwen2VLImageProcessorPil(**settings)(images=[image(70, 50)], return_tensors="np")
    config = ImageConfig(8, 3, 3, 576, 9216, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    patches, grid = patchify(image(70, 50), config)
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    np.testing.assert_array_equal(patches, expected["pixel_values"])


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([16, 28, 32]),
    low=st.integers(1, 9000),
    more=st.integers(2000, 2_000_000),
)
def test_smart_resize_is_the_reference(
    height: int, width: int, factor: int, low: int, more: int
) -> None:
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(InvalidInputError, match="elongated"):
            smart_resize(height, width, factor, low, low + more)
        return
    ours = smart_resize(height, width, factor, low, low + more)
    assert ours == reference_resize(height, width, factor, low, low + more)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    patches=st.integers(800, 5000),
    low=st.integers(1, 28 * 28 * 1280),
)
def test_a_bound_on_patches_holds(height: int, width: int, patches: int, low: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    config = ImageConfig(min_pixels=low, max_pixels=28 * 28 * 16384).at_most(patches)
    new = smart_resize(height, width, 28, config.min_pixels, config.max_pixels)
    assert new[0] * new[1] <= patches * 14 * 14
    small = ImageConfig(max_pixels=800 * 14 * 14)
    assert small.at_most(patches) is small


def test_too_elongated_is_an_input_error() -> None:
    with pytest.raises(InvalidInputError, match="1001 x 5") as caught:
        patchify(image(1001, 5), ImageConfig(), field="a.parts[0]")
    assert caught.value.field == "a.parts[0]"


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"min_pixels": 784, "max_pixels": 7840}, 784, 7840),
        ({"size": {"shortest_edge": 784, "longest_edge": 7840}}, 784, 7840),
        ({"size": {"min_pixels": 784, "max_pixels": 7840}}, 784, 7840),
        (
            {"max_pixels": 7840, "size": {"shortest_edge": 784, "longest_edge": 9999}},
            784,
            7840,
        ),
        ({}, 3136, 1003520),
    ],
)
def test_from_dir_reads_both_forms(
    tmp_path: Path, settings: dict[str, object], low: int, high: int
) -> None:
    raw = {"patch_size": 16, "merge_size": 2, "image_mean": [0.5] * 3, **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    config = ImageConfig.from_dir(tmp_path)
    assert (config.min_pixels, config.max_pixels, config.patch_size) == (low, high, 16)
    assert config.mean == (0.5, 0.5, 0.5)


def test_from_dir_reads_what_the_reference_saves(tmp_path: Path) -> None:
    reference = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 50_000})
    reference.save_pretrained(tmp_path)
    config = ImageConfig.from_dir(tmp_path)
    assert config == ImageConfig(min_pixels=784, max_pixels=50_000)

    nested = tmp_path / "nested"
    nested.mkdir()
    raw = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": raw}))
    assert ImageConfig.from_dir(nested) == config


@pytest.mark.parametrize("content", ['{"patch_size": 1', "[]", "", '{"size": [1]}'])
def test_from_dir_names_a_torn_file(tmp_path: Path, content: str) -> None:
    for config in (ImageConfig, VideoConfig):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(PreconditionError, match=tmp_path.name):
            config.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": []}')
    assert ImageConfig.from_dir(tmp_path) == ImageConfig()
    for content in ("[]", '{"image_processor": [1]}', '{"image_processor": "x"}'):
        (tmp_path / "processor_config.json").write_text(content)
        for config in (ImageConfig, VideoConfig):
            with pytest.raises(PreconditionError, match=tmp_path.name):
                config.from_dir(tmp_path)


def test_from_dir_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"preprocessor_config\.json"):
        ImageConfig.from_dir(tmp_path)
    raw = {"do_normalize": False, "rescale_factor": 1.0, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match=r"do_normalize.*resample = 2.*rescale_factor = 1"):
        ImageConfig.from_dir(tmp_path)
