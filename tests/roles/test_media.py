"""Videos and PDF pages through a role, from the wire's message to the vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_models
from tests.preprocess.test_pages import pdf
from tests.preprocess.test_video import movie
from tte.v1 import content_pb2
from tte_jax.codec.contents import decode_content
from tte_jax.content import Side
from tte_jax.engine.served_model import open_model
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.stages import EmbedItem


def item(**part: object) -> EmbedItem:
    message = content_pb2.Content(parts=[content_pb2.Part(**part)])  # pyright: ignore
    return EmbedItem(decode_content(message, "inputs[0].content"), Side.DOCUMENT)


def test_two_pages_of_one_file_are_two_pictures() -> None:
    data = pdf(60)
    pages = [item(page=content_pb2.Page(data=data, page=n)) for n in (0, 59, 0)]
    first, last, again = tiny_models.embedder().embed(pages)
    assert float(first @ last) < 0.999
    np.testing.assert_allclose(first, again, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3, 200])
def test_a_video_of_any_length_fits_what_is_served(frames: int) -> None:
    embedder = tiny_models.embedder()
    job = embedder.prepare(item(video=content_pb2.Video(data=movie(frames))))
    assert embedder.vision is not None
    assert 0 < sum(len(i.patches) for i in job.input.images) <= embedder.vision.max_patches
    assert np.isfinite(embedder.embed([item(video=content_pb2.Video(data=movie(frames)))])).all()


@pytest.mark.parametrize("width, height", [(9, 7), (300, 200), (1240, 1754), (1500, 300)])
def test_a_picture_of_any_size_fits_what_is_served(tmp_path: Path, width: int, height: int) -> None:
    directory = shutil.copytree(tiny_models.vl_dir(), tmp_path / "model")
    processor = directory / "preprocessor_config.json"
    published = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | published))
    data = tiny_models.png(0, width, height)
    spec = json.loads((directory / "tte.json").read_text())
    # Once the row of patches decides, once half of the sequence's 32 tokens.
    for images, embed, most in ((64, 64, 64), (1024, 32, 64)):
        spec["buckets"] |= {"images": [[1, images]], "embed": [[1, embed]]}
        (directory / "tte.json").write_text(json.dumps(spec))
        counts = set()
        for role in ("reasoner", "embedder"):
            prompts = open_model(directory, role=role).prompts
            content = item(image=content_pb2.Image(data=data)).content
            prompt = prompts.embed(EmbedItem(content, Side.DOCUMENT))
            assert len(prompt.ids) <= embed
            counts.add(sum(len(patches) for patches, _ in prompt.images))
        (count,) = counts
        assert 0 < count <= most


def test_bad_media_name_their_field() -> None:
    for part, reason in (
        (item(video=content_pb2.Video(data=b"x")), "UNREADABLE_VIDEO"),
        (item(page=content_pb2.Page(data=b"x")), "UNREADABLE_PAGE"),
        (item(page=content_pb2.Page(data=pdf(1), page=1)), "PAGE_OUT_OF_RANGE"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            tiny_models.embedder().embed([part])
        assert caught.value.reason == reason
        assert caught.value.field.startswith("inputs[0].content.parts[0].")
        assert caught.value.field.endswith(".data")


def test_a_text_model_reads_no_video() -> None:
    prompts = tiny_models.reranker().served.prompts
    with pytest.raises(UnsupportedError):
        prompts.embed(item(video=content_pb2.Video(data=movie(3))))
