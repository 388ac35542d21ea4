"""Vision plans and rotary positions against the reference library."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.positions import mrope_positions, text_positions
from tte_jax.preprocess.vision_plan import plan_vision

TEXT, START, END, IMAGE, VIDEO = 1, 2, 3, 4, 5


def positions(ids: list[int], grids: list[tuple[int, int, int]], **flags: bool):
    return mrope_positions(
        ids,
        grids,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        merge_size=2,
        **flags,
    )


def reference(ids: list[int], grids: list[tuple[int, int, int]]) -> tuple[np.ndarray, int]:
    """`Qwen2VLModel.get_rope_index` itself; it needs nothing of the model but the merge size."""
    stand_in = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=lambda *a, **k: Qwen2VLModel.get_vision_position_ids(None, *a, **k),
    )
    tokens = torch.tensor([ids])
    images = [g for g in grids if g[0] == 1]
    videos = [g for g in grids if g[0] > 1]
    out, delta = Qwen2VLModel.get_rope_index(
        stand_in,
        tokens,
        mm_token_type_ids=(tokens == IMAGE).int() + 2 * (tokens == VIDEO).int(),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return out[:, 0].numpy(), int(delta[0, 0]) + len(ids)


even = st.integers(1, 6).map(lambda n: 2 * n)
grid_lists = st.lists(st.tuples(st.integers(1, 3), even, even), max_size=4)


@given(grids=grid_lists, head=st.integers(0, 4), between=st.integers(0, 3), tail=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_positions_are_the_reference(
    grids: list[tuple[int, int, int]], head: int, between: int, tail: int
) -> None:
    ids = [TEXT] * head
    for t, h, w in grids:
        pad = IMAGE if t == 1 else VIDEO
        ids += [START] + [pad] * (t * h * w // 4) + [END] + [TEXT] * between
    ids += [TEXT] * (tail + 1)
    ours, following = positions(ids, grids)
    expected, expected_next = reference(ids, grids)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, expected)
    assert following == expected_next


def test_positions_by_hand() -> None:
    ours, following = positions([TEXT, *[IMAGE] * 6, TEXT], [(1, 4, 6)])
    assert ours.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert following == 5


def test_placeholders_without_vision_start() -> None:
    ids = [TEXT, IMAGE, IMAGE, START, IMAGE, IMAGE, END]
    grids = [(1, 2, 4)]
    ours, following = positions(ids, grids, require_vision_start=True)
    assert ours[0].tolist() == [0, 1, 2, 3, 4, 4, 6]
    assert ours[2].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert following == 7


@pytest.mark.parametrize(
    ("pads", "grids"),
    [(3, [(1, 4, 4)]), (5, [(1, 4, 4)]), (4, []), (4, [(1, 4, 4), (1, 4, 4)])],
)
def test_placeholder_mismatch(pads: int, grids: list[tuple[int, int, int]]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        positions([TEXT, START, *[IMAGE] * pads, END], grids)
    assert caught.value.reason == "PLACEHOLDER_MISMATCH"


def test_text_positions() -> None:
    assert text_positions(3, 5).tolist() == [[5, 6, 7]] * 3
    ours, following = positions([TEXT] * 3, [])
    assert ours.tolist() == text_positions(3).tolist() and following == 3
    empty, following = positions([], [])
    assert empty.shape == (3, 0) and following == 0


def test_plan_by_hand() -> None:
    plan = plan_vision([(1, 2, 4), (2, 2, 2)], merge_size=2, bucket=20)
    assert plan.n == 16
    assert plan.hw[:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert plan.segments.tolist() == [1] * 8 + [2] * 4 + [3] * 4 + [0] * 4
    assert not plan.hw[16:].any()
    assert (plan.hw.dtype, plan.segments.dtype) == (np.int32, np.int32)


@given(grids=grid_lists.filter(len))
@settings(max_examples=40, deadline=None)
def test_plan_is_the_reference(grids: list[tuple[int, int, int]]) -> None:
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    plan = plan_vision(grids, merge_size=2)
    grid = torch.tensor(grids)
    np.testing.assert_array_equal(plan.hw, get_vision_position_ids(grid, 2).numpy())
    lengths = np.bincount(plan.segments)[1:]
    np.testing.assert_array_equal(np.cumsum(lengths), get_vision_cu_seqlens(grid).numpy()[1:])


def test_plan_limits() -> None:
    assert plan_vision([], merge_size=2).hw.shape == (0, 2)
    with pytest.raises(InvalidInputError, match="16 patches, at most 12"):
        plan_vision([(1, 4, 4)], merge_size=2, bucket=12)
    with pytest.raises(InvalidInputError, match="blocks"):
        plan_vision([(1, 3, 4)], merge_size=2)
