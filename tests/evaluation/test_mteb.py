"""The embedder under the `mteb` library: a small task of its own kind, no network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tte_jax.builtin import models, openmoji
from tte_jax.content import Content, Side
from tte_jax.errors import UnsupportedError
from tte_jax.stages import EmbedItem, ReasonItem

mteb = pytest.importorskip("mteb", reason="the extra `mteb` is not installed")

from datasets import Dataset  # noqa: E402  # comes with mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from tte_jax.evaluation.mteb_model import MtebModel, contents  # noqa: E402


class Emoji(AbsTaskRetrieval):
    """Names against drawings."""

    metadata = TaskMetadata(
        name="EmojiRetrieval",
        description="names against drawings",
        dataset={"path": "none", "revision": "1"},
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["text", "image"],
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        main_score="hit_rate_at_1",
        prompt=cast("Any", {"query": "Find the picture."}),
    )

    def load_data(self, num_proc=None, **kwargs):
        del num_proc, kwargs
        shown = drawings()
        names = [e.shown.name for e in shown]
        images = [Image.open(io.BytesIO(picture(e))).convert("RGB") for e in shown]
        ids = [str(i) for i in range(len(shown))]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_dict({"id": ids, "image": images}),
                    "queries": Dataset.from_dict({"id": ids, "text": names}),
                    "relevant_docs": {i: {i: 1} for i in ids},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


def drawings():
    """Some that are plain things."""
    plain = [e for e in openmoji.entries() if not e.shown.group]
    return plain[::100][:10]


def picture(entry) -> bytes:
    return openmoji.document(entry).content.media[0].data


@pytest.fixture(scope="module")
def model():
    directory = models.resolve(models.EMBEDDER)
    made = MtebModel.from_pretrained(directory, directory, max_tokens=32)
    yield made
    made.close()


@pytest.mark.parametrize("reasons", [False, True])
def test_a_task_scores_as_the_roles_do(model: MtebModel, reasons: bool, tmp_path: Path) -> None:
    used = model if reasons else MtebModel(model.embedder)
    result = mteb.evaluate(
        used, Emoji(), cache=mteb.ResultCache(tmp_path), show_progress_bar=False, co2_tracker=False
    )
    scores = result.task_results[0].scores["test"][0]

    def vectors(side: Side, items: list[Content]) -> np.ndarray:
        ecrs = [""] * len(items)
        if reasons:
            asked = [
                ReasonItem(c, side, "Find the picture." if side is Side.QUERY else "")
                for c in items
            ]
            assert model.reasoner is not None
            ecrs = [r.text for r in model.reasoner.reason(asked, 32)]
            assert all(ecrs)
        return model.embedder.embed(
            [EmbedItem(c, side, e) for c, e in zip(items, ecrs, strict=True)]
        )

    shown = drawings()
    queries = vectors(Side.QUERY, [Content.of(e.shown.name) for e in shown])
    documents = vectors(Side.DOCUMENT, [Content.of("", picture(e)) for e in shown])
    hits = (queries @ documents.T).argmax(1) == np.arange(len(shown))
    assert scores["main_score"] == pytest.approx(hits.mean(), abs=1e-4)
    assert 0.3 < hits.mean()  # chance is a tenth
    meta = used.mteb_model_meta
    assert meta is not None and meta.name == f"tte-jax/{models.EMBEDDER}"
    assert (meta.experiment_kwargs is not None) == reasons


def test_inputs_are_texts_and_images() -> None:
    red = Image.new("RGB", (4, 4), "red")
    (one,) = contents({"text": ["words"], "image": [red], "id": ["1"]})
    assert one.text == "words" and len(one.media) == 1
    assert Image.open(io.BytesIO(one.media[0].data)).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UnsupportedError, match="the task has video"):
        list(contents({"video": [None], "text": ["a"]}))
    with pytest.raises(UnsupportedError, match="inputs have label"):
        list(contents({"label": [1]}))
