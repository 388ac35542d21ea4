"""What is said about directories that are not the model that was asked for."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import tiny_models
from tte_jax.embedder import Embedder
from tte_jax.engine.buckets import FULL, MINI
from tte_jax.engine.served_model import fingerprint, open_model
from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError
from tte_jax.reasoner import Reasoner
from tte_jax.reranker import Reranker


@pytest.fixture
def copy(tmp_path):
    """A changeable copy of the VL model's directory."""
    return shutil.copytree(tiny_models.vl_dir(), tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("role", [Reasoner, Embedder, Reranker])
def test_a_directory_that_is_not_there(role, tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere.*config\.json"):
        role.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"empty.*config\.json"):
        role.from_pretrained(tmp_path / "empty")


def test_missing_weights_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="safetensors"):
        Embedder.from_pretrained(copy)


def test_a_model_of_another_role_or_family(copy):
    with pytest.raises(PreconditionError, match="reranker, not for reasoner"):
        Reasoner.from_pretrained(tiny_models.text_dir())
    edit(copy / "tte.json", role=["reranker"])
    with pytest.raises(PreconditionError, match="qwen2_vl.*text family"):
        Reranker.from_pretrained(copy)
    edit(copy / "config.json", model_type="bert")
    with pytest.raises(PreconditionError, match="bert"):
        Embedder.from_pretrained(shutil.copytree(copy, copy.parent / "bert"))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tte_json(copy, text):
    (copy / "tte.json").write_text(text)
    with pytest.raises(PreconditionError, match="tte.json"):
        Embedder.from_pretrained(copy)


def test_an_unknown_dtype():
    with pytest.raises(InvalidInputError, match="int8"):
        Embedder.from_pretrained(tiny_models.vl_dir(), dtype="int8")


def test_the_ladder_comes_from_the_directory_unless_given(copy):
    assert open_model(copy, role="embedder").buckets.embed == ((4, 32), (2, 64))
    assert open_model(copy, role="embedder", buckets=FULL).buckets is FULL
    spec = json.loads((copy / "tte.json").read_text())
    del spec["buckets"]
    (copy / "tte.json").write_text(json.dumps(spec))
    assert open_model(copy, role="embedder").buckets is MINI


def test_the_version_follows_content_and_not_place(copy):
    here = open_model(tiny_models.vl_dir(), role="embedder").version
    assert here.startswith("tiny-qwen2_vl@")
    assert open_model(copy, role="embedder").version == here
    other = tiny_models.write_model(
        copy.parent / "retrained", family="qwen2_vl", roles=["reasoner", "embedder"], seed=9
    )
    retrained = open_model(other, role="embedder").version
    assert retrained != here, "weights of equal size, other values"
    (copy / "generation_config.json").write_text('{"eos_token_id": [1]}')
    other_stop = open_model(copy, role="embedder").version
    assert other_stop != here
    edit(copy / "preprocessor_config.json", max_pixels=28 * 28)
    assert open_model(copy, role="embedder").version not in (here, other_stop)


@pytest.mark.parametrize(
    "file",
    ["vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
     "special_tokens_map.json"],
)  # fmt: skip
def test_the_files_of_a_slow_tokenizer_count_where_they_are_read(copy, file):
    before = fingerprint(copy, "mini")
    (copy / file).write_text("{}")
    assert fingerprint(copy, "mini") == before
    (copy / "tokenizer.json").unlink()
    slow = fingerprint(copy, "mini")
    (copy / file).write_text('{"a": 1}')
    assert fingerprint(copy, "mini") not in (before, slow)
