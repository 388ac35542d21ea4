from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests import tiny_models
from tte_jax.engine.cache import ByteLru
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.inputs import ImageInput
from tte_jax.engine.vision import VisionEncoder, pack_images
from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.patches import ImageConfig, patchify
from tte_jax.weights import hf

CONFIG = ImageConfig(min_pixels=28 * 28, max_pixels=112 * 112)


def image(seed: int, width: int, height: int) -> ImageInput:
    data = tiny_models.png(seed, width, height)
    patches, grid = patchify(Image.open(io.BytesIO(data)), CONFIG)
    return ImageInput(f"{seed}", patches, grid)


@pytest.fixture(scope="module")
def encoder():
    model = hf.load(tiny_models.vl_dir())
    table = ExecutableTable(model)
    made = VisionEncoder(table, model.config.vision, [(1, 16), (1, 64), (2, 64)], cache_bytes=0)
    table.warmup()
    return made


def test_packed_images_of_unequal_sizes_equal_single_ones(encoder):
    sizes = [(28, 28), (56, 28), (28, 84), (56, 56), (84, 56), (28, 56)]
    images = [image(i, w, h) for i, (w, h) in enumerate(sizes)]
    packed, _ = encoder.features(images)
    for one in images:
        alone, _ = encoder.features([one])
        assert alone[one.key].shape == (len(one.patches) // 4, 64)
        np.testing.assert_allclose(packed[one.key], alone[one.key], atol=1e-5)
    assert np.abs(packed["1"] - packed["5"]).max() > 1e-3


def test_a_broken_image_spoils_no_neighbour_and_is_not_kept(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "cache", ByteLru(2**20, lambda x: x.nbytes))
    good = [image(i, 56, 56) for i in range(3)]
    broken = ImageInput("broken", np.full_like(good[0].patches, np.nan), good[0].grid)
    assert len(pack_images([*good, broken], [64])) == 1
    # A row of 64 patches alone: there the four stand together.
    monkeypatch.setattr(encoder, "_shapes", ((1, 64), (2, 64)))
    found, _ = encoder.features([good[0], broken, *good[1:]])
    assert not np.isfinite(found["broken"]).any()
    for one in good:
        assert np.isfinite(found[one.key]).all()
        assert encoder.cache.get(one.key) is found[one.key]
    assert encoder.cache.get("broken") is None
    _, cached = encoder.features([*good, broken])
    assert cached == {"0", "1", "2"}


def test_packing_fills_rows_and_never_splits_an_image():
    images = [
        ImageInput(str(i), np.zeros((n, 1), np.float32), (1, n // 2, 2))
        for i, n in enumerate([40, 24, 16, 12, 4, 64])
    ]
    packs = pack_images(images, [16, 64])
    assert sorted(i.key for p in packs for i in p.images) == list("012345")
    assert all(p.used == sum(len(i.patches) for i in p.images) <= p.size for p in packs)
    assert sum(p.size for p in packs) <= 64 + 64 + 2 * 16  # 160 patches, no row wasted


def test_an_image_above_every_bucket_is_refused_with_the_limit(encoder):
    big = ImageInput("big", np.zeros((128, 1176), np.float32), (1, 8, 16))
    with pytest.raises(InvalidInputError, match="128 patches.*at most 64") as caught:
        encoder.check([big], field="inputs[0].content")
    assert caught.value.field == "inputs[0].content"
    with pytest.raises(InvalidInputError):
        encoder.features([big])


def test_the_cache_is_bounded_in_bytes_and_drops_the_oldest():
    cache: ByteLru[bytes] = ByteLru(10, len)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"  # now the newest
    cache.put("c", b"1234")
    assert cache.get("b") is None
    assert (cache.get("a"), cache.get("c"), cache.bytes) == (b"1234", b"1234", 8)
    cache.put("a", b"12")
    assert cache.bytes == 6
    cache.put("huge", b"x" * 11)
    assert cache.get("huge") is None and len(cache) == 2
