"""The registry against the composition in the benchmark's description."""

from __future__ import annotations

from collections import Counter

import pytest

from tte_jax.errors import InvalidInputError
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DATASETS, as_json, select

SIZES = {
    ("image", "classification"): 10,
    ("image", "qa"): 10,
    ("image", "retrieval"): 12,
    ("image", "grounding"): 4,
    ("video", "classification"): 5,
    ("video", "qa"): 5,
    ("video", "retrieval"): 5,
    ("video", "moment_retrieval"): 3,
    ("visdoc", "vidore_v1"): 10,
    ("visdoc", "vidore_v2"): 4,
    ("visdoc", "visrag"): 6,
    ("visdoc", "out_of_domain"): 4,
}


def test_composition() -> None:
    assert Counter((str(d.modality), str(d.group)) for d in DATASETS) == SIZES
    assert len(BY_NAME) == len(DATASETS) == 78


def test_metrics_follow_the_modality() -> None:
    assert {(str(d.modality), d.metric) for d in DATASETS} == {
        ("image", "hit@1"),
        ("video", "hit@1"),
        ("visdoc", "ndcg_linear@5"),
    }


def test_pools() -> None:
    spread = {d.name for d in DATASETS if d.pool == "global"}
    classes, captions = select(["video/classification"]), select(["video/retrieval"])
    pages = {d.name for d in select(["visdoc"])}
    assert spread == pages | {d.name for d in classes + captions} - {"SmthSmthV2"}


def test_page_sets_are_the_fixed_ones() -> None:
    assert BY_NAME["ViDoSeek-page"].repo == "VLM2Vec/ViDoSeek-page-fixed"
    assert BY_NAME["MMLongBench-page"].repo == "VLM2Vec/MMLongBench-page-fixed"


def test_reasoning_sides_follow_the_published_method() -> None:
    sides = {name: (BY_NAME[name].ecr_query, BY_NAME[name].ecr_target) for name in BY_NAME}
    assert sides["SUN397"] == sides["GQA"] == sides["MVBench"] == (True, False)
    assert sides["QVHighlight"] == (True, True)
    assert sides["ViDoRe_docvqa"] == sides["MSVD"] == (False, True)


def test_select() -> None:
    assert len(select(["all"])) == 78
    assert [d.name for d in select(["UCF101", "HMDB51", "Kinetics-700"])] == [
        "K700",
        "HMDB51",
        "UCF101",
    ]
    assert len(select(["image/qa", "image"])) == 36
    with pytest.raises(InvalidInputError, match="Did you mean ImageNet-1K"):
        select(["imagenet-1k"])


def test_json_has_what_the_list_promises() -> None:
    keys = {"name", "modality", "pool", "metric", "query_instruction"}
    assert all(keys <= as_json(d).keys() for d in DATASETS)
