"""The device programs against the plain forward pass of the same model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.engine import programs
from tte_jax.engine.decode_state import empty_state
from tte_jax.engine.next_token import NO_TOKEN, Control, Stops, advance
from tte_jax.engine.packing import EVEN
from tte_jax.weights import hf

STOPS = Stops(stop=(2,), close_tag=(7, 8), forced_close=(7, 8, 9))
PLAIN = Stops(stop=(511,), close_tag=(510,), forced_close=(510,))
SLOTS, LENGTH = 3, 24


@pytest.fixture(scope="module")
def vl():
    return hf.load(tiny_models.vl_dir())


@pytest.fixture(scope="module")
def text():
    return hf.load(tiny_models.text_dir())


def control(rows: int, **values) -> Control:
    fields = dict(
        last_token=np.zeros(rows, np.int32),
        generated=np.zeros(rows, np.int32),
        limit=np.full(rows, 100, np.int32),
        close_at=np.full(rows, 1000, np.int32),
        forced=np.full(rows, -1, np.int32),
        matched=np.zeros(rows, np.int32),
        closed=np.zeros(rows, bool),
        done=np.zeros(rows, bool),
        failed=np.zeros(rows, bool),
        temperature=np.zeros(rows, np.float32),
        top_p=np.ones(rows, np.float32),
        seed=np.zeros(rows, np.uint32),
    )
    return Control(**(fields | values))


def rows_of(lengths: list[int], tokens: int, *, seed: int = 0):
    """Random right-padded prompts with text positions."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, 400, (len(lengths), tokens)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (len(lengths), 3, tokens)).copy()
    return ids, positions, np.array(lengths, np.int32)


def a_row_each(ids, positions, n, slots):
    """Arguments of `prefill` behind the state, without the control values."""
    slots, steps = np.int32(slots), np.arange(ids.shape[1], dtype=np.int32)
    real = steps < n[:, None]
    ends = np.maximum(n - 1, 0)[:, None]
    cells = np.stack([np.where(real, slots[:, None], SLOTS), np.where(real, steps, 0)])
    which = np.arange(len(n), dtype=np.int32)
    return ids, positions, np.int32(real), ends, None, None, cells, which, slots, n, n


@jax.jit
def whole_forward(model, ids, n):
    """Keys, values and logits of one whole sequence [1, LENGTH], n tokens of it real."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (1, 3, LENGTH))
    hidden, kv = model.forward(ids, valid=jnp.arange(LENGTH)[None] < n, positions=positions)
    return kv, model.logits(hidden)[0]


def forward(model, ids):
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return whole_forward(model, padded, len(ids))


def decode_run(model, state, steps_left: int):
    """Prefill of two prompts into slots 2 and 0, then decoding; tokens per prompt."""
    ids, positions, n = rows_of([5, 8], 8)
    prefill = jax.jit(partial(programs.prefill, stops=PLAIN))
    state, first, _, _ = prefill(model, state, *a_row_each(ids, positions, n, [2, 0]), control(2))
    decode = jax.jit(partial(programs.decode, places=LENGTH, steps=steps_left, stops=PLAIN))
    slots, closed = np.arange(SLOTS, dtype=np.int32), np.zeros(SLOTS, bool)
    state, tokens, *_ = decode(model, state, slots, np.array([True, False, True]), closed)
    tokens = np.asarray(tokens)
    assert (tokens[:, 1] == NO_TOKEN).all()
    made = [
        [int(first[0]), *tokens[:, 2].tolist()],
        [int(first[1]), *tokens[:, 0].tolist()],
    ]
    return ids, n, made, state


def test_decoding_equals_one_forward_pass_over_prompt_and_answer(text):
    """Same tokens, and the same keys and values in every layer at every position."""
    state = empty_state(text, slots=SLOTS, length=LENGTH)
    ids, n, made, state = decode_run(text, state, 7)
    for row, slot in enumerate((2, 0)):
        whole = np.concatenate([ids[row, : n[row]], made[row]])
        count = len(whole)
        (k, v), logits = forward(text, whole)
        start = int(n[row]) - 1
        assert made[row] == np.asarray(logits)[start : count - 1].argmax(-1).tolist()
        filled = int(state.length[slot])
        assert filled == count - 1  # the newest token is not in the cache yet
        np.testing.assert_allclose(state.k[:, slot, :filled], k[:, 0, :filled], atol=1e-4)
        np.testing.assert_allclose(state.v[:, slot, :filled], v[:, 0, :filled], atol=1e-4)


def test_what_an_earlier_sequence_left_in_a_slot_changes_nothing(text):
    clean = empty_state(text, slots=SLOTS, length=LENGTH)
    rng = np.random.default_rng(1)
    noise = jnp.asarray(rng.normal(0, 50, clean.k.shape), clean.k.dtype)
    dirty = replace(clean, k=noise, v=-noise, length=jnp.full((SLOTS,), 9, jnp.int32))
    assert decode_run(text, clean, 7)[2] == decode_run(text, dirty, 7)[2]


def filled_slots(model, slots: list[int]):
    """A state with one prompt in each of some slots, and the prompts' lengths."""
    ids, positions, n = rows_of([5, 8, 3][: len(slots)], 8)
    prefill = jax.jit(partial(programs.prefill, stops=PLAIN))
    state = empty_state(model, slots=SLOTS, length=LENGTH)
    state, *_ = prefill(model, state, *a_row_each(ids, positions, n, slots), control(len(slots)))
    return state, n


@pytest.mark.parametrize("model", ["stacked", "apart", "turned"])
def test_few_slots_and_short_caches_decode_as_the_whole_does(text, model):
    """Whichever slots they are, in whatever order, and however their weights lie."""
    form = {"stacked": text, "apart": text.apart(), "turned": text.apart(turned=True)}[model]
    found = {}
    for slots, places in (([2, 0], 16), ([0, 2], 16), ([0, 1, 2], LENGTH)):
        state, n = filled_slots(text, [0, 2])
        decode = jax.jit(partial(programs.decode, places=places, steps=4, stops=PLAIN))
        alive, closed = np.array([s != 1 for s in slots]), np.zeros(len(slots), bool)
        # Twice, so that what the first call put back is what the second one reads.
        state, one, *_ = decode(form, state, np.int32(slots), alive, closed)
        state, two, *_ = decode(form, state, np.int32(slots), alive, closed)
        tokens = np.concatenate([one, two])
        found[tuple(slots)] = [tokens[:, slots.index(s)].tolist() for s in (0, 2)]
        assert np.asarray(state.length).tolist() == [n[0] + 8, 0, n[1] + 8]
        assert np.asarray(state.control.generated).tolist() == [9, 0, 9]
    assert len({repr(f) for f in found.values()}) == 1, found


def test_a_row_that_fills_the_shape_leaves_its_slot_as_it_is(text):
    """Also a slot whose prompt is still being read: done, with places filled."""
    before, _ = filled_slots(text, [0, 2])
    decode = jax.jit(partial(programs.decode, places=16, steps=4, stops=PLAIN))
    after, tokens, *_ = decode(
        text, before, np.int32([0, 2]), np.array([True, False]), np.zeros(2, bool)
    )
    assert (np.asarray(tokens)[:, 1] == NO_TOKEN).all()
    np.testing.assert_array_equal(after.k[:, 2], before.k[:, 2])
    np.testing.assert_array_equal(after.v[:, 1:], before.v[:, 1:])
    assert int(after.length[2]) == int(before.length[2])
    assert bool(after.control.done[2]) and not bool(after.control.done[0])


def test_a_sequence_is_the_same_to_the_bit_in_every_row_and_beside_anybody(text):
    """Keys and values of 4 steps, in one program of two rows."""
    decode = jax.jit(partial(programs.decode, places=16, steps=4, stops=PLAIN))
    found = []
    for slots, alive in (([0, 1], [1, 1]), ([1, 0], [1, 1]), ([0, 2], [1, 0]), ([2, 0], [1, 1])):
        state, n = filled_slots(text, [0, 1, 2])
        state, *_ = decode(text, state, np.int32(slots), np.array(alive) > 0, np.zeros(2, bool))
        found.append(np.asarray(state.k[:, 0, : n[0] + 4]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_sequences_that_end_within_a_dispatch_write_no_further(text):
    state, n = filled_slots(text, [0, 1])
    state = replace(state, control=replace(state.control, limit=jnp.int32([3, 100, 0])))
    decode = jax.jit(partial(programs.decode, places=LENGTH, steps=6, stops=PLAIN))
    after, tokens, _, done, _ = decode(
        text,
        state,
        np.arange(SLOTS, dtype=np.int32),
        np.array([1, 1, 0]) > 0,
        np.zeros(SLOTS, bool),
    )
    assert (np.asarray(tokens)[:, 0] != NO_TOKEN).tolist() == [True] * 2 + [False] * 4
    assert np.asarray(after.length).tolist() == [n[0] + 2, n[1] + 6, 0]
    np.testing.assert_array_equal(after.k[:, 0, n[0] + 2 :], state.k[:, 0, n[0] + 2 :])
    assert np.asarray(done).tolist() == [True, False, True]


def test_a_padding_row_of_a_prefill_is_written_nowhere(text):
    state = empty_state(text, slots=SLOTS, length=LENGTH)
    ids, positions, n = rows_of([5, 0], 8)
    after, *_ = jax.jit(partial(programs.prefill, stops=PLAIN))(
        text, state, *a_row_each(ids, positions, n, [1, SLOTS]), control(2)
    )
    assert np.asarray(after.length).tolist() == [0, 5, 0]
    assert not np.asarray(after.k[:, [0, 2]]).any()


def test_score_with_a_shared_prefix_equals_whole_sequences(text):
    prefix_ids, prefix_positions, prefix_n = rows_of([6], 8, seed=3)
    ids, positions, n = rows_of([4, 7, 2], 8, seed=4)
    before = jax.jit(programs.prefix)(text, prefix_ids, prefix_positions, prefix_n)
    scores = jax.jit(partial(programs.score, yes_id=20, no_id=21))(
        text, before, ids, positions + 6, n
    )
    for row in range(3):
        whole = np.concatenate([prefix_ids[0, :6], ids[row, : n[row]]])
        logits = np.asarray(forward(text, whole)[1])[len(whole) - 1]
        expected = 1 / (1 + np.exp(logits[21] - logits[20]))
        assert float(scores[row]) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(np.asarray(scores)) > 1e-3  # the candidates do differ


embed = jax.jit(programs.embed)


def embedded(model, ids, positions, n, vis=None, vis_idx=None):
    """[B D], each row one sequence of n tokens."""
    segments = (np.arange(ids.shape[1])[None] < n[:, None]).astype(np.int32)
    z = embed(model, ids, positions, segments, n[:, None] - 1, vis, vis_idx)
    return np.asarray(z)[:, 0]


def test_garbage_in_pads_changes_no_embedding(vl):
    ids, positions, n = rows_of([5, 3], 8)
    vis = np.random.default_rng(5).normal(size=(16, 64)).astype(np.float32)
    vis_idx = np.full((2, 8), -1, np.int32)
    vis_idx[0, 1:3] = [1, 2]
    clean = embedded(vl, ids, positions, n, vis, vis_idx)
    padded = np.arange(8)[None] >= n[:, None]
    dirty_ids = np.where(padded, 499, ids)
    dirty_positions = np.where(padded[:, None], 77, positions)
    dirty_idx = np.where(padded, 9, vis_idx)
    dirty_vis = vis.copy()
    dirty_vis[9] = 1e6
    dirty = embedded(vl, dirty_ids, dirty_positions, n, dirty_vis, dirty_idx)
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_allclose(np.linalg.norm(clean, axis=1), 1.0, atol=1e-6)
    other = embedded(vl, ids, positions, n, vis * 2, vis_idx)
    assert np.abs(other[0] - clean[0]).max() > 1e-3  # images do count
    np.testing.assert_array_equal(other[1], clean[1])


def test_few_places_have_the_states_of_the_whole(vl):
    ids, positions, n = rows_of([8, 6], 8)
    valid = np.arange(8)[None] < n[:, None]
    at = np.int32([[7, 2, 0], [5, 5, 1]])

    @jax.jit
    def run(model):
        forward = partial(model.forward, ids, valid=valid, positions=positions)
        return forward(), forward(at=at)

    (hidden, (k, v)), (few, (k_few, v_few)) = run(vl)
    np.testing.assert_allclose(few, np.asarray(hidden)[np.arange(2)[:, None], at], atol=1e-5)
    np.testing.assert_allclose(k_few, k, atol=1e-5)
    np.testing.assert_allclose(v_few, v, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_a_sequence_in_a_shared_row_is_the_same_to_the_bit_wherever_it_stands(vl, apart):
    """Its embedding alone at the beginning, and between random others at every place where one may
    begin."""
    model, rng, tokens = vl.apart() if apart else vl, np.random.default_rng(3), 96
    length = 41
    own = rng.integers(10, 400, length).astype(np.int32)

    def row(start: int, alone: bool) -> np.ndarray:
        ids = rng.integers(10, 400, (1, tokens)).astype(np.int32)
        segments = np.ones((1, tokens), np.int32)
        segments[0, start + length :] = 3
        if alone:
            ids[:], segments[:] = 0, 0
        positions = rng.integers(0, 40, (1, 3, tokens)).astype(np.int32)
        ids[0, start : start + length] = own
        segments[0, start : start + length] = 2
        positions[0, :, start : start + length] = np.arange(length)
        ends = np.zeros((1, 6), np.int32)
        at = int(rng.integers(6))
        ends[0, at] = start + length - 1
        return np.asarray(embed(model, ids, positions, segments, ends, None, None))[0, at]

    alone = row(0, alone=True)
    for start in range(0, tokens - length + 1, EVEN):
        np.testing.assert_array_equal(row(start, alone=False), alone, err_msg=str(start))


def test_what_is_no_number_stays_in_its_sequence(vl):
    ids, positions, _ = rows_of([24], 24)
    segments = np.repeat(np.int32([[1, 2, 3]]), 8, axis=1)
    ends = np.int32([[7, 15, 23]])
    vis = np.random.default_rng(5).normal(size=(4, 64)).astype(np.float32)
    vis_idx = np.full((1, 24), -1, np.int32)
    vis_idx[0, [2, 10, 18]] = [0, 1, 2]
    clean = np.asarray(embed(vl, ids, positions, segments, ends, vis, vis_idx))[0]
    for broken in (np.nan, np.inf):
        spoilt = vis.copy()
        spoilt[1, 5] = broken
        z = np.asarray(embed(vl, ids, positions, segments, ends, spoilt, vis_idx))[0]
        np.testing.assert_array_equal(z[[0, 2]], clean[[0, 2]])
        assert np.isnan(z[1]).all()


advance = jax.jit(partial(advance, stops=STOPS))


def says(*wanted: int, vocabulary: int = 16):
    """Logits of a model that wants to say these tokens, one per row."""
    return jnp.asarray(np.eye(vocabulary, dtype=np.float32)[list(wanted)])


def run_control(c: Control, wants: list[int]) -> tuple[list[int], Control]:
    """Feeds one slot with a model's wishes; what it says until it is done."""
    said = []
    for want in wants:
        if bool(c.done[0]):
            break
        token, c = advance(c, says(want))
        said.append(int(token[0]))
    return said, c


def test_an_open_think_block_is_closed_by_force_and_the_answer_goes_on():
    said, c = run_control(control(1, close_at=np.int32([3]), limit=np.int32([8])), [5] * 20)
    assert said == [5, 5, 5, 7, 8, 9, 5, 5]  # three thoughts, the close, the answer, the limit
    assert bool(c.closed[0]) and int(c.forced[0]) == 3


def test_a_think_block_that_the_model_closed_is_left_alone():
    wants = [5, 7, 8, 5, 5, 5, 5, 2, 5]
    said, c = run_control(control(1, close_at=np.int32([4]), limit=np.int32([20])), wants)
    assert said == [5, 7, 8, 5, 5, 5, 5, 2]  # until its own stop token
    assert int(c.forced[0]) == -1


def test_half_a_close_tag_is_not_a_close():
    said, _ = run_control(
        control(1, close_at=np.int32([4]), limit=np.int32([9])), [7, 5, 7, 7, 5, 5, 5, 5, 5]
    )
    assert said == [7, 5, 7, 7, 7, 8, 9, 5, 5]


def test_the_host_may_see_the_close_in_the_text():
    said, c = run_control(
        control(1, close_at=np.int32([2]), limit=np.int32([5]), closed=np.array([True])), [5] * 9
    )
    assert said == [5] * 5
    assert int(c.forced[0]) == -1


def test_a_stop_token_of_the_model_does_not_cut_the_forced_close():
    said, c = run_control(control(1, close_at=np.int32([0]), limit=np.int32([9])), [2] * 9)
    assert said == [7, 8, 9, 2]
    assert bool(c.done[0])


def test_logits_that_are_not_numbers_end_the_slot_and_no_other():
    logits = says(5, 5).at[0, 3].set(jnp.nan)
    _, c = advance(control(2), logits)
    assert np.asarray(c.failed).tolist() == [True, False]
    assert np.asarray(c.done).tolist() == [True, False]


def test_draws_follow_the_probabilities_within_the_nucleus():
    """p = .5, .3, .2: a nucleus of .75 keeps the first two, of .5 only the first."""
    rows = 4000
    logits = jnp.tile(jnp.log(jnp.asarray([[0.5, 0.3, 0.2] + [1e-30] * 13])), (rows, 1))
    seeds = np.arange(rows, dtype=np.uint32)

    def shares(temperature: float, top_p: float):
        c = control(
            rows,
            temperature=np.full(rows, temperature, np.float32),
            top_p=np.full(rows, top_p, np.float32),
            seed=seeds,
        )
        token, _ = advance(c, logits)
        return np.bincount(np.asarray(token), minlength=3)[:3] / rows

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.2], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.75), [0.625, 0.375, 0.0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.5), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(shares(0.0, 1.0), [1.0, 0.0, 0.0])
