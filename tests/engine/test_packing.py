"""Sequences in shared rows: everything stands once, where there is room for it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tte_jax.engine.buckets import DISPATCH_TOKENS
from tte_jax.engine.inputs import ModelInput, pack_rows
from tte_jax.engine.packing import EVEN, Rows, most_sequences, plan_packed, widest
from tte_jax.preprocess.positions import text_positions

TABLE = ((1, 48), (1, 128), (4, 128), (8, 128), (2, 256))


def test_rows_are_filled_from_the_first_on_and_hold_as_many_as_they_have_places_for():
    rows = Rows((2, 32))
    assert [rows.add(n) for n in (20, 10, 5, 4)] == [(0, 0, 0), (0, 20, 1), (1, 0, 0), (1, 6, 1)]
    assert most_sequences(32) == 2
    assert rows.add(1) is None  # tokens are left, places are not
    assert (rows.used, rows.counts) == ([30, 10], [2, 2])
    assert Rows((4, 32)).add(33) is None


def test_plans_hold_every_input_once_without_overlap():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 256) for _ in range(rng.randint(1, 60))]
        seen = []
        for batch in plan_packed(lengths, TABLE):
            assert batch.shape in TABLE
            taken = np.zeros(batch.shape, int)
            numbers = set()
            for place in batch.places:
                end = place.start + lengths[place.index]
                assert place.start % EVEN == 0
                assert end <= batch.shape[1] and place.number < most_sequences(batch.shape[1])
                taken[place.row, place.start : end] += 1
                numbers.add((place.row, place.number))
                seen.append(place.index)
            assert taken.max() == 1 and len(numbers) == len(batch.places)
            assert batch.rows == taken.any(axis=1).sum()
        assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ((40,), [(1, 48)]),
        ((40, 40, 40), [(1, 128)]),
        ((40,) * 12, [(4, 128)]),
        ((40,) * 24, [(8, 128)]),
        ((200, 40), [(2, 256)]),
        ((100, 28), [(1, 128)]),
    ],
)
def test_a_batch_takes_the_shape_in_which_a_token_costs_least(lengths, shapes):
    assert [batch.shape for batch in plan_packed(lengths, TABLE)] == shapes


def test_packing_costs_less_than_a_row_for_each():
    rng = random.Random(1)
    lengths = [rng.randint(28, 84) for _ in range(64)]
    packed = sum(b.shape[0] * b.shape[1] + DISPATCH_TOKENS for b in plan_packed(lengths, TABLE))
    assert packed < 1.2 * sum(lengths)


def test_the_widest_shape_has_room_for_most_tokens():
    assert widest(40, TABLE) == (8, 128)
    assert widest(129, TABLE) == (2, 256)
    with pytest.raises(ValueError):
        widest(257, TABLE)


def test_arrays_say_where_sequences_begin_and_end():
    inputs = [
        ModelInput(
            np.arange(10 * i, 10 * i + n, dtype=np.int32),
            text_positions(n),
            n,
            (),
            np.zeros(n, bool),
        )
        for i, n in enumerate((5, 20, 11), start=1)
    ]
    (batch,) = plan_packed([one.tokens for one in inputs], ((2, 32),))
    ids, positions, segments, ends = pack_rows(inputs, batch)
    assert ids.shape == segments.shape == (2, 32) and ends.shape == (2, 2)
    assert batch.rows == 2
    assert segments[0].tolist() == [1] * 20 + [2] * 11 + [0]
    assert segments[1].tolist() == [1] * 5 + [0] * 27
    assert ids[0, :31].tolist() == [*range(20, 40), *range(30, 41)]
    assert positions[0, 1, :31].tolist() == [*range(20), *range(11)]
    assert ends.tolist() == [[19, 30], [4, 0]]
