"""Prompts read in pieces, and behind kept beginnings, against prompts read whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side
from tte_jax.engine import programs
from tte_jax.engine.buckets import Buckets
from tte_jax.engine.decode_state import DecodeState, abstract_state, empty_state
from tte_jax.engine.executables import ExecutableTable, backend_compiles
from tte_jax.engine.inputs import ModelInput, model_input
from tte_jax.engine.jobs import NEVER, Job, control_of
from tte_jax.engine.next_token import Stops
from tte_jax.engine.prefill import Filling, Prefill
from tte_jax.engine.served_model import ServedModel, open_model
from tte_jax.engine.vision import VisionEncoder
from tte_jax.stages import ReasonItem

STOPS = Stops(stop=(2,), close_tag=(7, 8), forced_close=(7, 8, 9))
TEXT = "a smiling cat face with a dark skin tone the thing that is wanted yes no"
COMMON = {"images": ((4, 16),), "decode": ((3, 88),), "new_tokens": 16}
WHOLE = Buckets(prefill=((1, 72),), **COMMON)
# Pieces of three tokens: of an image of four, some end within it.
PIECES = Buckets(append=((2, 3, 69),), prefix=(48, 64), **COMMON)


@dataclass
class Engine:
    """A `Prefill` and its slots, whose programs give the logits in place of the first token."""

    served: ServedModel
    buckets: Buckets
    cache_bytes: int = 2**20

    def __post_init__(self) -> None:
        model, b = self.served.model, self.buckets
        self.table = ExecutableTable(model)
        config = self.served.config.vision
        assert config is not None
        vision = VisionEncoder(self.table, config, b.images)
        where = {"slots": b.slots, "length": b.cache_length, "layout": self.table.layout}
        abstract = abstract_state(model, **where)
        self.prefill = Prefill(
            self.table,
            model,
            b,
            STOPS,
            abstract,
            vision=vision,
            prefix_cache_bytes=self.cache_bytes,
        )
        self.table.warmup()
        self.state: DecodeState = empty_state(model, **where)

    def dirty(self) -> None:
        """Fills the caches with what other sequences could have left."""
        draw = np.random.default_rng(3).normal(0, 9, self.state.k.shape).astype(np.float32)
        self.state = replace(self.state, k=jax.device_put(draw), v=jax.device_put(-draw))

    def read(self, *inputs: ModelInput) -> tuple[list[np.ndarray], list[Filling]]:
        """The logits behind each prompt; prompt i goes into slot i."""
        fillings = [self.prefill.start(one, slot) for slot, one in enumerate(inputs)]
        logits: dict[int, np.ndarray] = {}
        while left := [f for f in fillings if f.left]:
            for filling in left:
                self.state = self.prefill.restore(self.state, filling)
            for dispatch in self.prefill.plan(left):
                jobs = [Job(f.input, max_tokens=9, close_at=NEVER) for f in dispatch.fillings]
                control = control_of(jobs, dispatch.results)
                self.state, out, _, failed = self.prefill.run(self.state, dispatch, control)
                assert not np.asarray(failed)[: len(jobs)].any()
                for row, (f, n) in enumerate(zip(dispatch.fillings, dispatch.counts, strict=True)):
                    self.prefill.finish(self.state, f, n)
                    if not f.left:
                        logits[f.slot] = np.asarray(out)[row]
        return [logits[f.slot] for f in fillings], fillings

    def cache(self, slot: int, tokens: int) -> np.ndarray:
        return np.stack([np.asarray(x)[:, slot, :tokens] for x in (self.state.k, self.state.v)])


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def engines(request):
    """(whole, in pieces) of one family; the last has features for several layers (DeepStack)."""
    family = request.param
    directory = tiny_models.root() / f"prefill-{family}"
    tiny_models.write_model(directory, family=family, roles=["reasoner"])
    served = open_model(directory, role="reasoner")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "advance", lambda control, logits, stops: (logits, control))
        whole, pieces = Engine(served, WHOLE), Engine(served, PIECES)
    compiled = backend_compiles()
    yield whole, pieces
    assert backend_compiles() == compiled, "a program was compiled after the warm-up"


def prompt(served: ServedModel, text: str, *images: tuple[int, int, int]) -> ModelInput:
    content = Content.of(text, *(tiny_models.png(*image) for image in images))
    return model_input(served.prompts.reason(ReasonItem(content, Side.QUERY)), served.config)


# 7 x 4 vision tokens and the two around them: the 35th token stands within an image.
SEVEN = tuple((i, 56, 56) for i in range(10, 17))
BEGINNINGS = {
    "text": (f"{TEXT} {TEXT}", ()),
    "behind an image": (TEXT, ((5, 56, 56), (6, 28, 56))),
    "within an image": ("red", SEVEN),
}


def marked(engine: Engine, case: str, end: int = 35) -> ModelInput:
    """A prompt whose first `end` tokens are marked as shared."""
    text, images = BEGINNINGS[case]
    one = replace(prompt(engine.served, text, *images), prefix_ends=(end,))
    assert one.tokens > end + 1
    assert bool(one.is_media[end - 1] and one.is_media[end]) == (case == "within an image")
    return one


def test_pieces_are_the_whole(engines):
    whole, pieces = engines
    inputs = [
        prompt(whole.served, TEXT),
        prompt(whole.served, TEXT, (1, 56, 56), (2, 56, 28)),
        prompt(whole.served, TEXT, (3, 28, 56)),
    ]
    assert inputs[1].is_media[[5, 6]].any() and inputs[1].is_media.sum() > 4
    cut = [m for one in inputs for m in np.flatnonzero(one.is_media[1:] & one.is_media[:-1]) + 1]
    assert any(m % 3 == 0 for m in cut), "no piece ends within an image"
    expected, _ = whole.read(*inputs)
    pieces.dirty()
    found, fillings = pieces.read(*inputs)
    for slot, one in enumerate(inputs):
        np.testing.assert_allclose(found[slot], expected[slot], rtol=0, atol=1e-5)
        assert found[slot].argmax() == expected[slot].argmax()
        np.testing.assert_allclose(
            pieces.cache(slot, one.tokens), whole.cache(slot, one.tokens), rtol=0, atol=1e-5
        )
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    assert [f.cached_tokens for f in fillings] == [0, 0, 0]


def test_every_prompt_comes_to_its_end_whatever_the_ladder(engines):
    """Plans only: each dispatch fits its shape, and the pieces of a prompt add up."""
    prefill, rng = engines[1].prefill, np.random.default_rng(0)
    one = prompt(engines[1].served, TEXT)
    usual = prefill._buckets
    try:
        for _ in range(60):
            append = tuple(
                (int(rng.integers(1, 4)), int(rng.integers(1, 40)), int(rng.integers(0, 80)) + 1)
                for _ in range(rng.integers(1, 4))
            )
            b = replace(usual, append=append, prefill=((1, 8), (2, 16)))
            prefill._buckets, prefill._reach = b, max(s for _, _, s in append)
            prefill._budget = max(rows * tokens for rows, tokens, _ in append)
            lengths = rng.integers(1, b.longest_prompt + 1, 5)
            fillings = [
                Filling(replace(one, ids=np.zeros(n, np.int32)), slot)
                for slot, n in enumerate(lengths)
            ]
            while left := [f for f in fillings if f.left]:
                dispatches = prefill.plan(left)
                assert left[0] in {f for d in dispatches for f in d.fillings}
                for d in dispatches:
                    assert len(d.fillings) <= d.shape[0] and max(d.counts) <= d.shape[1]
                    for f, n in zip(d.fillings, d.counts, strict=True):
                        assert 0 < n <= f.left
                        if d.program == "append":
                            assert f.filled <= d.key[2]
                        else:
                            assert (f.filled, n) == (0, f.input.tokens)
                        f.filled += n
    finally:
        prefill._buckets, prefill._reach = usual, max(s for _, _, s in usual.append)
        prefill._budget = max(rows * tokens for rows, tokens, _ in usual.append)


def test_padding_and_what_lies_in_the_slots_change_nothing(engines):
    _, pieces = engines
    one = prompt(pieces.served, TEXT, (4, 56, 56))
    (clean,), _ = pieces.read(one)
    others = pieces.cache(1, PIECES.cache_length).copy()
    (again,), _ = pieces.read(one)
    np.testing.assert_array_equal(pieces.cache(1, PIECES.cache_length), others)
    pieces.dirty()
    (dirty,), _ = pieces.read(one)
    np.testing.assert_array_equal(clean, again)
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("case", BEGINNINGS)
def test_behind_a_kept_beginning_the_result_is_the_same(engines, case):
    whole, pieces = engines
    one = marked(pieces, case)
    pieces.prefill.prefixes.cache.clear()
    (expected,), _ = whole.read(one)
    (missed,), (first,) = pieces.read(one)
    assert len(pieces.prefill.prefixes.cache) == 1
    pieces.dirty()
    hits, fillings = pieces.read(one, one, one)
    behind = int(one.is_media[35:].sum())  # of them the features were cached
    for logits, filling in zip(hits, fillings, strict=True):
        assert filling.cached_tokens == 35 + behind
        np.testing.assert_allclose(logits, missed, rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        assert logits.argmax() == expected.argmax()
    assert first.beginnings == fillings[0].beginnings


def test_prompts_that_come_together_wait_for_the_first_of_them(engines):
    whole, pieces = engines
    one = marked(pieces, "text")
    ids = one.ids.copy()
    ids[-3] += 1
    other = replace(one, ids=ids)
    pieces.prefill.prefixes.cache.clear()
    expected, _ = whole.read(one, other)
    found, (first, second) = pieces.read(one, other)
    assert (first.cached_tokens, second.cached_tokens) == (0, 35)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_another_image_under_the_same_text_is_another_beginning(engines):
    """Also when only its first tokens stand in the beginning; later images do not matter."""
    whole, pieces = engines
    one = marked(pieces, "within an image")
    at = [int(m) for m in np.flatnonzero(~one.is_media[:-1] & one.is_media[1:]) + 1]
    cut = max(i for i, start in enumerate(at) if start < 35)
    others = []
    for changed in (0, cut, cut + 1):
        images = tuple((90, 56, 56) if i == changed else image for i, image in enumerate(SEVEN))
        other = replace(prompt(pieces.served, "red", *images), prefix_ends=(35,))
        np.testing.assert_array_equal(other.ids, one.ids)
        others.append(other)
    pieces.prefill.prefixes.cache.clear()
    pieces.read(one)
    expected, _ = whole.read(*others)
    found, fillings = pieces.read(*others)
    assert [f.beginnings == pieces.prefill.start(one, 0).beginnings for f in fillings] == [
        False,
        False,
        True,
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_positions_are_part_of_what_a_beginning_is(engines):
    """A wide and a high image make the same ids; features and positions differ."""
    _, pieces = engines
    wide, high = (
        replace(prompt(pieces.served, f"{TEXT} {TEXT}", (8, *size)), prefix_ends=(35,))
        for size in ((56, 28), (28, 56))
    )
    np.testing.assert_array_equal(wide.ids, high.ids)
    moved = replace(wide, positions=high.positions)
    keys = {pieces.prefill.start(x, 0).beginnings[0].key for x in (wide, high, moved)}
    assert len(keys) == 3


def test_short_and_whole_beginnings_are_not_kept(engines):
    _, pieces = engines
    one = marked(pieces, "text")
    for end in (31, one.tokens, 65):
        assert pieces.prefill.start(replace(one, prefix_ends=(end,)), 0).beginnings == ()
    both = replace(one, prefix_ends=(32, 40))
    assert [b.end for b in pieces.prefill.start(both, 0).beginnings] == [32, 40]


def test_the_bound_in_bytes_holds(engines):
    whole, pieces = engines
    cache = pieces.prefill.prefixes.cache
    place = 2 * np.prod(pieces.state.k.shape[:1] + pieces.state.k.shape[3:]) * 4
    bound, cache._max_bytes = cache._max_bytes, int(2.5 * 48 * place)  # two of 48 places
    one = marked(pieces, "text")
    try:
        cache.clear()
        for token in (20, 21, 22, 23, 20):
            ids = one.ids.copy()
            ids[0] = token
            other = replace(one, ids=ids)
            (found,), (filling,) = pieces.read(other)
            assert filling.cached_tokens == 0  # it had left again, too
            np.testing.assert_allclose(found, whole.read(other)[0][0], rtol=0, atol=1e-5)
            assert cache.bytes <= cache._max_bytes
            assert cache.bytes == len(cache) * 48 * place
        assert len(cache) == 2
    finally:
        cache._max_bytes = bound


def test_prompts_that_share_a_row_are_the_same_to_the_bit_as_alone(engines):
    """Logits, and keys and values in their slots, of texts and pictures in any order."""
    whole, _ = engines
    inputs = [
        prompt(whole.served, "a cat"),
        prompt(whole.served, "", (1, 56, 56)),
        prompt(whole.served, "two dogs", (2, 56, 56)),
    ]
    alone = []
    for one in inputs:
        (logits,), _ = whole.read(one)
        alone.append((logits, whole.cache(0, one.tokens)))
    for order in ([0, 1], [1, 0], [2, 0], [1, 2, 0]):
        some = [inputs[i] for i in order]
        starts = [whole.prefill.start(one, slot) for slot, one in enumerate(some)]
        plan = whole.prefill.plan(starts)
        assert any(len(d.fillings) > 1 and d.rows == 1 for d in plan), "nobody shares a row"
        whole.dirty()
        logits, _ = whole.read(*some)
        for slot, i in enumerate(order):
            np.testing.assert_array_equal(logits[slot], alone[i][0])
            np.testing.assert_array_equal(whole.cache(slot, inputs[i].tokens), alone[i][1])


@pytest.mark.parametrize(
    ("shapes", "apart"),
    [(((4, 32), (8, 32)), True), (((1, 32), (4, 32)), True), (((8, 32),), False)],
)
def test_texts_do_not_wait_for_the_features_of_others_images(shapes, apart):
    """As long as two batches are about as cheap as one."""
    served = open_model(tiny_models.vl_dir(), role="reasoner")
    table = ExecutableTable(served.model)
    buckets = Buckets(prefill=shapes, **COMMON)
    where = {"slots": 8, "length": buckets.cache_length, "layout": table.layout}
    prefill = Prefill(
        table,
        served.model,
        buckets,
        STOPS,
        abstract_state(served.model, **where),
        vision=None,
        prefix_cache_bytes=0,
    )
    text, image = prompt(served, "a cat"), prompt(served, "", (1, 56, 56))
    assert text.tokens <= 32 and image.tokens <= 32
    inputs = [image, text, image, text, text, image, image, text]
    plan = prefill.plan([prefill.start(one, slot) for slot, one in enumerate(inputs)])
    read = [[f.slot for f in dispatch.fillings] for dispatch in plan]
    texts, images = [1, 3, 4, 7], [0, 2, 5, 6]
    if apart:
        assert all(set(slots) <= set(texts) or set(slots) <= set(images) for slots in read)
        assert [slot for slots in read for slot in slots] == texts + images
    else:
        assert [sorted(slots) for slots in read] == [list(range(8))]
