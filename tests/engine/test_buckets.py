from __future__ import annotations

import random

import pytest

from tte_jax.engine.buckets import (
    DISPATCH_TOKENS,
    FULL,
    MINI,
    cheapest,
    longest,
    plan_batches,
    smallest,
)
from tte_jax.errors import InvalidInputError, PreconditionError

TABLE = ((1, 64), (4, 64), (16, 64), (2, 128))


def test_smallest_rung_and_its_limit():
    assert smallest(1, (64, 128), what="prompt") == 64
    assert smallest(64, (128, 64), what="prompt") == 64
    assert smallest(65, (64, 128), what="prompt") == 128
    with pytest.raises(InvalidInputError, match="129 tokens.*at most 128") as caught:
        smallest(129, (64, 128), what="prompt")
    assert caught.value.reason == "TOO_LONG"
    assert caught.value.metadata["limit"] == "128"


def test_an_image_fits_the_largest_row_and_half_of_every_sequence():
    assert [FULL.image_patches(r, 4) for r in ("reasoner", "embedder")] == [4096, 4096]
    assert FULL.image_patches("reranker", 4) == 2048
    assert MINI.image_patches("embedder", 4) == 64
    assert FULL.replace({"embed": [[1, 512]]}).image_patches("reasoner", 4) == 1024
    assert FULL.replace({"images": []}).image_patches("embedder", 4) == 0


LADDER = ((1, 80), (16, 64), (2, 256))


@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [
        (1, 40, (1, 80)),  # not among 15 empty rows
        (4, 40, (1, 80)),
        (9, 64, (1, 80)),  # 80 tokens and a dispatch for each, against 117
        (10, 64, (16, 64)),
        (40, 64, (16, 64)),
        (40, 65, (1, 80)),
        (1, 81, (2, 256)),
    ],
)
def test_the_cheapest_shape_pads_least_for_each_input(rows, tokens, shape):
    assert cheapest(rows, tokens, LADDER) == shape


def test_equal_costs_run_together():
    assert cheapest(20, 64, ((1, 64), (16, 64), (4, 64))) == (16, 64)


def test_plans_cover_every_row_once_in_a_bucket_that_holds_it():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 128) for _ in range(rng.randint(1, 60))]
        plan = plan_batches(lengths, TABLE, what="prompt")
        rows = [row for batch in plan for row in batch.rows]
        assert sorted(rows) == list(range(len(lengths)))
        for batch in plan:
            assert batch.shape in TABLE
            assert len(batch.rows) <= batch.shape[0]
            assert all(lengths[row] <= batch.shape[1] for row in batch.rows)
        # One at a time would never be cheaper.
        alone = sum(min(cost((b, t)) for b, t in TABLE if t >= n) for n in lengths)
        assert sum(cost(batch.shape) for batch in plan) <= alone


def cost(shape):
    return shape[0] * shape[1] + DISPATCH_TOKENS


def test_too_long_input_is_refused_before_anything_is_planned():
    with pytest.raises(InvalidInputError, match="129 tokens"):
        plan_batches([3, 129], TABLE, what="prompt")


def test_ladder_from_tte_json():
    changes = {"prefill": [[2, 32]], "decode": [[1, 24], [4, 99]], "new_tokens": 16, "prefix": [32]}
    ladder = MINI.replace(changes)
    assert ladder.prefill == ((2, 32),)
    assert (ladder.cache_length, ladder.slots) == (48, 4)
    assert ladder.decode_shapes == ((1, 24), (4, 48))  # the whole is there, and nothing beyond it
    assert ladder.embed == MINI.embed
    assert longest(ladder.prefill) == 32
    assert longest(()) == 0
    assert (ladder.chunk, ladder.longest_in_chunks, ladder.longest_prompt) == (0, 0, 32)


def test_a_ladder_with_chunks():
    append = [[1, 128, 512], [4, 128, 512], [1, 512, 1536], [1, 16, 1536]]
    ladder = MINI.replace({"append": append})
    assert ladder.append == tuple(map(tuple, append))
    assert (ladder.chunk, ladder.longest_in_chunks) == (512, 2048)
    assert ladder.longest_prompt == 2048 and ladder.cache_length == 2048 + ladder.new_tokens
    # The longest T is of no use behind the last place that it reaches.
    assert MINI.replace({"append": [[1, 1024, 512], [1, 64, 1300]]}).longest_prompt == 1364
    assert MINI.replace({"append": [[1, 16, 48]]}).longest_prompt == 128  # `prefill` goes further


@pytest.mark.parametrize(
    "changes",
    [
        {"prefil": [[1, 64]]},
        {"prefill": [[0, 64]]},
        {"prefill": [64]},
        {"prefill": 64},
        {"new_tokens": "many"},
        {"decode": [4]},
        {"append": [[1, 64]]},
        {"prefill": [[1, 64, 64]]},
    ],
)
def test_a_malformed_ladder_is_refused(changes):
    with pytest.raises(PreconditionError, match="buckets"):
        MINI.replace(changes)
