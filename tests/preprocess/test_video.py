"""Video against the reference's own functions.

Its video processors need torchvision to be imported, which the tests do not have. So the functions
`sample_frames`, `smart_resize`, `resize` (up to the size it decides on) and `patchify` are taken
from their source files and run as they stand, with torch. Resizing itself is Pillow's here and
torchvision's there; they are compared through torch's own antialiased bicubic.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess import video as video_module
from tte_jax.preprocess.video import (
    fused_levels,
    load_video,
    probe_video,
    sampled_frames,
    video_bytes,
)
from tte_jax.preprocess.video_config import VideoConfig

CONFIGS = {"qwen2_vl": VideoConfig(), "qwen3_vl": VideoConfig.qwen3_vl()}


def reference(family: str) -> SimpleNamespace:
    """The functions of a family's video processor, compiled from its source without its imports."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin
    file = Path(spec.origin).parent / "models" / family / f"video_processing_{family}.py"
    tree = ast.parse(file.read_text())
    found: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "smart_resize":
            found.append(node)
        if isinstance(node, ast.ClassDef) and node.name.endswith("VideoProcessor"):
            wanted = ("sample_frames", "patchify", "resize")
            found += [n for n in node.body if getattr(n, "name", "") in wanted]
    for node in found:
        assert isinstance(node, ast.FunctionDef)
        for arg in [*node.args.args, *node.args.kwonlyargs]:
            arg.annotation = None
        node.returns = None
        for call in ast.walk(node):
            # `super().resize(image, size=...)` is torchvision's; only the size is of interest.
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                inner = call.func.value
                if isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "super":
                    call.func = ast.Name("decided", ast.Load())
    space: dict[str, Any] = {
        "torch": torch,
        "np": np,
        "math": math,
        "SizeDict": lambda **k: SimpleNamespace(**k),
        "decided": lambda image, size, resample: (size.height, size.width),
    }
    module = ast.fix_missing_locations(ast.Module(found, []))
    exec(compile(module, str(file), "exec"), space)
    return SimpleNamespace(**space)


REFERENCES = {family: reference(family) for family in CONFIGS}


def processor(family: str) -> SimpleNamespace:
    c = CONFIGS[family]
    return SimpleNamespace(
        num_frames=None,
        fps=c.fps,
        min_frames=c.min_frames,
        max_frames=c.max_frames,
        temporal_patch_size=c.temporal_patch_size,
        max_video_tokens=c.video_tokens,
    )


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=300)
@given(
    frames=st.integers(2, 40_000),
    fps=st.sampled_from([1.0, 7.5, 24.0, 23.976, 29.97, 30.0, 60.0]),
)
def test_sampling_is_the_reference(family: str, frames: int, fps: float) -> None:
    metadata = SimpleNamespace(total_num_frames=frames, fps=fps)
    expected = REFERENCES[family].sample_frames(processor(family), metadata)
    ours, theirs = CONFIGS[family].sample(frames, fps), np.asarray(expected)
    assert ours.shape == theirs.shape
    # torch's `arange` in float32 rounds by the lanes of the machine's vector unit, so that which of
    # two neighbours a whole number becomes is not the same everywhere.
    apart = np.abs(ours - theirs)
    allowed = 0.0 if family == "qwen3_vl" or frames < 4000 else 0.01
    assert apart.max() <= 1 and (apart > 0).mean() <= allowed


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=300)
@given(
    frames=st.integers(2, 768),
    height=st.integers(8, 2200),
    width=st.integers(8, 2200),
)
def test_size_is_the_reference(family: str, frames: int, height: int, width: int) -> None:
    c = CONFIGS[family]
    if max(height, width) > 200 * min(height, width):
        return
    # A frame without pixels: only its shape is asked for.
    shape = SimpleNamespace(shape=(1, frames, 3, height, width))
    expected = REFERENCES[family].resize(
        processor(family),
        shape,
        SimpleNamespace(shortest_edge=c.min_pixels, longest_edge=c.max_pixels),
        None,
        c.patch_size * c.merge_size,
        c.temporal_patch_size,
        cap_pixels_per_frame=True,
    )
    assert c.size(frames, height, width) == expected


def test_one_frame_is_repeated_where_the_reference_fails() -> None:
    for config in CONFIGS.values():
        assert config.sample(1, 30.0).tolist() == [0]
        assert config.size(1, 64, 64) == config.size(2, 64, 64)


@given(patches=st.integers(4, 5000), frames=st.integers(1, 3000), side=st.integers(30, 900))
@settings(max_examples=100)
def test_a_bound_on_patches_holds(patches: int, frames: int, side: int) -> None:
    for config in (
        VideoConfig(max_patches=patches),
        VideoConfig(patch_size=16, whole_video=True, video_tokens=768, max_patches=patches),
    ):
        indices = config.sample(frames, 25.0)
        height, width = config.size(len(indices), side, 700)
        t = math.ceil(len(indices) / 2)
        assert t * (height // config.patch_size) * (width // config.patch_size) <= patches
        assert min(height, width) > 0


def movie(
    frames: int, width: int = 96, height: int = 64, rate: int = 10, kind: str = "mp4"
) -> bytes:
    """A coded video whose picture changes from frame to frame."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        codec = {"mp4": "mpeg4", "matroska": "mpeg4"}[kind]
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
        for i in range(frames):
            picture = np.broadcast_to(ramp + (i * 7) % 70, (height, width, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize("family", CONFIGS)
def test_patches_are_the_reference(family: str, kind: str) -> None:
    data = movie(35, kind=kind)  # 3.5 s at 2 per second: 6 or 7 frames; 7 fill a patch up
    config = CONFIGS[family]
    info = probe_video(data)
    assert (info.frames, info.fps, info.width, info.height) == (35, 10.0, 96, 64)
    indices = config.sample(info.frames, info.fps)
    with av.open(io.BytesIO(data)) as container:
        everything = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    seen = [np.asarray(f) for f in sampled_frames(data, indices, info)]
    np.testing.assert_array_equal(np.stack(seen), np.stack([everything[i] for i in indices]))

    height, width = config.size(len(indices), 64, 96)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2),
        (height, width),
        mode="bicubic",
        antialias=True,
    )
    mean = torch.tensor(config.mean) * (1.0 / (1 / 255))
    std = torch.tensor(config.std) * (1.0 / (1 / 255))
    pixels = (resized.float() - mean[:, None, None]) / std[:, None, None]
    expected, *grid = REFERENCES[family].patchify(None, pixels[None], config.patch_size, 2, 2)
    ours = load_video(data, config)
    assert ours.grid == tuple(grid)
    assert ours.patches.dtype == np.float32
    # Both round after each of the two passes, with weights of different precision: two 8-bit levels
    # are the most that comes of it, and it is rare.
    level = float(1 / (255 * min(config.std)))
    apart = np.abs(ours.patches - expected[0].numpy())
    assert apart.max() <= 2 * level * 1.01 and apart.mean() < 0.05 * level


def test_levels_are_the_fused_normalisation() -> None:
    for config in CONFIGS.values():
        mean = torch.tensor(config.mean) * (1.0 / (1 / 255))
        std = torch.tensor(config.std) * (1.0 / (1 / 255))
        levels = torch.arange(256).float().expand(3, 256)
        expected = (levels - mean[:, None]) / std[:, None]
        np.testing.assert_array_equal(fused_levels(config.mean, config.std), expected.numpy())


def test_times_are_the_reference() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    config = VideoConfig.qwen3_vl()
    for frames, fps in ((35, 10.0), (300, 29.97), (5, 24.0)):
        indices = config.sample(frames, fps)
        expected = Qwen3VLProcessor._calculate_timestamps(
            SimpleNamespace(),
            indices.tolist(),
            fps,
            2,  # pyright: ignore[reportArgumentType]
        )
        assert config.times(indices, fps) == tuple(expected)
        metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=indices.tolist())
        assert config.seconds_per_patch(len(indices), frames, fps) == 2 / metadata.sampled_fps


def test_a_long_video_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 frames of 320 x 240 are 138 MB decoded; what is held is the patches of a few."""
    data = movie(600, 320, 240, rate=20)
    config = VideoConfig(min_pixels=784, max_pixels=28 * 28 * 16, max_frames=8)
    bound = video_bytes(config, 8, 240, 320)
    alive = [0]
    original = video_module._Filling.add

    def add(self: Any, frame: Any) -> None:
        alive[0] += 1
        original(self, frame)

    monkeypatch.setattr(video_module._Filling, "add", add)
    tracemalloc.start()
    made = load_video(data, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert alive[0] == 8, "frames that are not sampled are never made to pictures"
    assert made.patches.nbytes <= bound
    assert peak < bound + 8 * 320 * 240 * 3 + 2 * len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EMPTY_VIDEO"),
        (b"no video at all", "UNREADABLE_VIDEO"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "UNREADABLE_VIDEO"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "UNREADABLE_VIDEO"),
    ],
)
def test_what_is_no_video(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_video(data, VideoConfig(), field="c.parts[0].video.data")
    assert caught.value.reason == reason
    assert caught.value.field == "c.parts[0].video.data"


def test_a_video_of_an_unknown_codec() -> None:
    data = movie(5, kind="matroska").replace(b"V_MPEG4/ISO/ASP", b"V_UNKNOWN/CODEC")
    with pytest.raises(InvalidInputError, match="codec") as caught:
        load_video(data, VideoConfig(), field="c.parts[0].video.data")
    assert caught.value.reason == "UNREADABLE_VIDEO"
    assert caught.value.field == "c.parts[0].video.data"


def test_a_video_cut_short() -> None:
    whole = movie(60, kind="matroska")
    with pytest.raises(InvalidInputError) as caught:
        info = probe_video(whole)
        list(sampled_frames(whole[: len(whole) // 2], np.array([0, 59]), info))
    assert caught.value.reason == "BROKEN_VIDEO"
    with pytest.raises(InvalidInputError):
        load_video(movie(60)[:3000], VideoConfig())


def test_limits_come_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = movie(10)
    monkeypatch.setattr(video_module, "MAX_VIDEO_FRAMES", 9)
    with pytest.raises(InvalidInputError, match="10 frames") as caught:
        probe_video(data)
    assert caught.value.reason == "VIDEO_TOO_LONG"
    monkeypatch.setattr(video_module, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    with pytest.raises(InvalidInputError, match="96 x 64") as caught:
        probe_video(data)
    assert caught.value.reason == "VIDEO_TOO_LARGE"


def test_from_dir(tmp_path: Path) -> None:
    assert VideoConfig.from_dir(tmp_path) is None
    image = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    config = VideoConfig.from_dir(tmp_path)
    assert config == VideoConfig(min_pixels=3136, max_pixels=12845056)
    newer = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "fps": 2,
    }
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(newer))
    (tmp_path / "tte.json").write_text(json.dumps({"video": {"fps": 1.0, "max_frames": 64}}))
    config = VideoConfig.from_dir(tmp_path)
    assert config is not None and config.whole_video
    assert (config.min_pixels, config.max_pixels) == (4096, 25165824)
    assert (config.fps, config.max_frames, config.video_tokens) == (1.0, 64, 768)
