"""The engine on eight devices: what it answers on one, with nothing compiled after warm-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sharding import runs, serving
from tests.tiny_models import text_dir, vl_dir

PATIENCE_S = 840.0  # the child compiles what three roles need for two meshes
pytestmark = [pytest.mark.timeout(PATIENCE_S + 60), pytest.mark.many_devices]

MESHES = [
    {"data": 2, "fsdp": 2, "tp": 2},
    {"data": 1, "fsdp": 2, "tp": 4},  # wider than the two key/value heads
]


@pytest.fixture(scope="module", params=[None, "int8"])
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(answers on one device, answers of each mesh)."""
    folder: Path = tmp_path_factory.mktemp("serving")
    order = {"vl": str(vl_dir()), "text": str(text_dir()), "quantise": request.param}
    meshes = MESHES if request.param is None else MESHES[:1]
    child = runs.start(
        order | {"meshes": meshes, "out": str(folder)},
        folder,
        devices=8,
        module="tests.sharding.serving",
    )
    alone = serving.answers(order)
    runs.finish(child, timeout_s=PATIENCE_S)
    return alone, [json.loads((folder / f"{i}.json").read_text()) for i in range(len(meshes))]


def test_embeddings_and_scores_are_those_of_one_device(told) -> None:
    alone, meshes = told
    vectors = np.array(alone["embeddings"])
    assert (vectors @ vectors.T - np.eye(len(vectors)))[:-1, :-1].max() < 0.99
    assert np.ptp(alone["scores"]) > 0.1
    assert len(alone["slots"]) == len(serving.CONTENTS) + 1
    for there in meshes:
        np.testing.assert_allclose(there["embeddings"], vectors, rtol=0, atol=1e-5)
        np.testing.assert_allclose(there["slots"], alone["slots"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(there["scores"], alone["scores"], rtol=0, atol=1e-5)


def test_texts_are_those_of_one_device(told) -> None:
    alone, meshes = told
    assert len(set(alone["greedy"])) > 2 and alone["greedy"] != alone["drawn"]
    for there in meshes:
        assert there["greedy"] == alone["greedy"]
        assert there["drawn"] == alone["drawn"]


def test_a_kept_beginning_is_reused_as_on_one_device(told) -> None:
    alone, meshes = told
    assert alone["reused"] == [alone["reused"][0], 36]
    assert alone["behind_prefix"][0] == alone["behind_prefix"][1]
    for there in meshes:
        assert there["reused"] == alone["reused"]
        assert there["behind_prefix"] == alone["behind_prefix"]


def test_nothing_is_compiled_after_warm_up(told) -> None:
    alone, meshes = told
    for one in (alone, *meshes):
        assert [one[f"{role}_compiles"] for role in ("embedder", "reasoner", "reranker")] == [0] * 3


def test_weights_and_caches_are_split(told) -> None:
    _, meshes = told
    assert meshes[0]["matrix"] == "P(None, 'fsdp', 'tp', None)"
    assert meshes[0]["cache"] == meshes[0]["prefix"] == "P(None, None, None, 'tp', None)"
    if len(meshes) > 1:  # two key/value heads on four devices
        assert meshes[1]["cache"] == meshes[1]["prefix"] == "P(None, None, None, None, None)"
        assert meshes[1]["matrix"] == "P(None, 'fsdp', 'tp', None)"
