"""The decode loop with a tiny real model."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import NO_REASONING, Content, Side
from tte_jax.engine.executables import backend_compiles
from tte_jax.engine.jobs import ANSWER_RESERVE, think_limit
from tte_jax.errors import DeadlineExceededError, InternalError, InvalidInputError
from tte_jax.reasoner import Reasoner
from tte_jax.stages import EmbedItem, ReasonItem, Sampling

WAIT_S = 60.0


@pytest.fixture(scope="module")
def reasoner():
    role = tiny_models.reasoner()
    yield role
    assert role.loop.active == 0 and len(role.queue) == 0, "a test left work behind"


def item(text: str = "", *images: int) -> ReasonItem:
    side = Side.DOCUMENT if images and not text else Side.QUERY
    return ReasonItem(Content.of(text, *(tiny_models.png(i) for i in images)), side)


ITEMS = [item("a cat"), item("", 1), item("red", 2), item("the smiling dog face"), item("", 3)]


@pytest.mark.parametrize("forced", [1, 4])
def test_the_limit_of_thinking_leaves_room_for_the_answer(forced):
    assert think_limit(0, forced) is None
    assert think_limit(forced, forced) is None
    for budget in range(forced + 1, 400):
        limit = think_limit(budget, forced)
        answer = budget - forced - limit
        assert limit >= 0 and 1 <= answer <= ANSWER_RESERVE
    assert think_limit(100, forced) == 100 - forced - ANSWER_RESERVE


@pytest.mark.parametrize("budget", [6, 8, 13, 24])
def test_the_budget_is_hard_and_the_answer_line_is_there(reasoner, budget):
    for reasoning in reasoner.reason(ITEMS, budget):
        assert reasoning.tokens <= budget
        assert reasoning.text.count("</think>") == 1
        assert "Answer:" in reasoning.text.partition("</think>")[2]
        assert reasoning.truncated


def test_a_budget_too_small_for_an_answer_means_no_reasoning(reasoner):
    dispatches = reasoner.loop.stats.dispatches
    assert reasoner.reason(ITEMS[:2], 0) == [NO_REASONING, NO_REASONING]
    assert reasoner.reason(ITEMS[:1], 2) == [NO_REASONING]
    assert reasoner.loop.stats.dispatches == dispatches
    with pytest.raises(InvalidInputError, match="below 0"):
        reasoner.reason(ITEMS[:1], -1)


def test_a_budget_above_the_models_is_cut_to_it(reasoner):
    limit = reasoner.max_new_tokens
    reasonings = reasoner.reason(ITEMS, 4096)
    assert reasonings == reasoner.reason(ITEMS, limit)
    assert max(r.tokens for r in reasonings) <= limit


def test_what_runs_beside_a_sequence_does_not_change_it(reasoner):
    alone = [reasoner.reason([one], 24)[0] for one in ITEMS]
    assert len({r.text for r in alone}) > 1
    assert reasoner.reason(ITEMS, 24) == alone
    # More sequences than slots, with other budgets between them.
    futures = []
    for repeat in range(4):
        for budget in (24, 7 + repeat):
            futures.append(
                (budget, reasoner.submit([reasoner.prepare(o, budget) for o in ITEMS], wait=True))
            )
    for budget, some in futures:
        found = [f.result(WAIT_S).reasoning for f in some]
        if budget == 24:
            assert found == alone


def test_few_sequences_decode_in_a_program_of_few_rows(reasoner, monkeypatch):
    """Also when the slots that they are in are the last ones."""
    run, shapes = reasoner.table.run, []

    def seen(name, key, *arguments):
        if name == "decode":
            shapes.append(key)
        return run(name, key, *arguments)

    (alone,) = reasoner.reason([ITEMS[3]], 24)
    monkeypatch.setattr(reasoner.table, "run", seen)
    jobs = [
        reasoner.prepare(one, budget) for one, budget in zip(ITEMS, (6, 6, 6, 24), strict=False)
    ]
    found = [f.result(WAIT_S) for f in reasoner.submit(jobs, wait=True)]
    assert found[3].reasoning == alone
    rows = [rows for rows, _ in shapes]
    assert rows[0] == 4 and rows[-1] == 2 and rows == sorted(rows, reverse=True)


def test_draws_depend_on_their_seed_alone(reasoner):
    def texts(items, seed):
        sampling = Sampling(temperature=1.5, seed=seed)
        return [r.text for r in reasoner.reason(items, 24, sampling=sampling)]

    together = texts(ITEMS, 7)
    assert texts([ITEMS[3]], 7) == [together[3]]
    assert texts([ITEMS[3]], 8) != [together[3]]
    with pytest.raises(InvalidInputError, match="temperature"):
        Sampling(temperature=9.0)


def test_a_stop_text_ends_the_sequence_and_frees_its_slot(reasoner):
    whole = reasoner.reason(ITEMS[:1], 24)[0]
    stop = whole.text[6:8]
    before = whole.text[: whole.text.index(stop)]
    sampling = Sampling(stop=("never written", stop))
    used = reasoner.loop.stats.tokens_out
    events = list(reasoner.stream(ITEMS[:1], 24, sampling=sampling))
    finished = events[-1]
    assert finished.reasoning.text == before.strip() and before.strip()
    assert "".join(e.text for e in events[:-1]) == before
    # It was seen within a dispatch, and nothing more was written for it.
    steps = reasoner.served.buckets.decode_steps
    assert finished.usage.tokens_out == reasoner.loop.stats.tokens_out - used
    assert finished.usage.tokens_out < whole.tokens or whole.tokens <= steps + 1
    assert reasoner.loop.active == 0


def test_cancelling_gives_the_slot_back_within_one_dispatch(reasoner):
    loop = reasoner.loop
    cancelled, dispatches = loop.stats.cancelled, []
    future = None
    submitted = threading.Event()

    def listener(_ids, _last):
        assert submitted.wait(WAIT_S)
        dispatches.append(loop.stats.dispatches)
        future.cancel()

    job = replace(reasoner.prepare(ITEMS[0], 24), on_tokens=listener)
    (future,) = loop.submit([job])
    submitted.set()
    with pytest.raises(CancelledError):
        future.result(WAIT_S)
    # The next sequence gets through, and by then the cancelled one is gone.
    assert reasoner.reason([ITEMS[1]], 8)[0].tokens > 0
    assert loop.stats.cancelled == cancelled + 1
    assert len(dispatches) == 1, "it was decoded on after its cancellation"
    assert loop.active == 0


def test_closing_a_stream_reaches_its_slots(reasoner):
    cancelled = reasoner.loop.stats.cancelled
    run, closed = reasoner.table.run, threading.Event()

    def held(name, *arguments):
        if name == "decode":
            assert closed.wait(WAIT_S)
        return run(name, *arguments)

    reasoner.table.run = held
    try:
        stream = reasoner.stream([ITEMS[0], ITEMS[3]], 24)
        next(stream)
        stream.close()
    finally:
        closed.set()
        del reasoner.table.run
    reasoner.reason([ITEMS[2]], 8)
    assert reasoner.loop.stats.cancelled == cancelled + 2


def test_a_deadline_that_passes_during_decoding_frees_the_slot(reasoner):
    loop = reasoner.loop
    entries = []
    put = loop.queue.put

    def catching(some, **kwargs):
        entries.extend(some)
        put(some, **kwargs)

    def listener(_ids, _last):
        entries[0].deadline = time.monotonic() - 1.0

    job = replace(reasoner.prepare(ITEMS[0], 24), on_tokens=listener)
    loop.queue.put = catching
    try:
        (future,) = loop.submit([job], deadline=time.monotonic() + 3600)
    finally:
        del loop.queue.put
    with pytest.raises(DeadlineExceededError, match="of at most 24 tokens"):
        future.result(WAIT_S)


def test_a_poisoned_prompt_fails_alone(reasoner):
    good = reasoner.prepare(ITEMS[0], 24)
    image = reasoner.prepare(ITEMS[1], 24)
    broken = replace(image.input, is_media=np.zeros_like(image.input.is_media))
    expected = reasoner.reason([ITEMS[0]], 24)[0]
    futures = reasoner.submit([good, replace(image, input=broken), good])
    with pytest.raises(InternalError, match="vision tokens"):
        futures[1].result(WAIT_S)
    assert futures[0].result(WAIT_S).reasoning == expected
    assert futures[2].result(WAIT_S).reasoning == expected


def test_features_that_are_not_numbers_fail_alone(reasoner):
    image = reasoner.prepare(item("", 77), 24)
    (one,) = image.input.images
    bad = replace(one, key="nan", patches=np.full_like(one.patches, np.nan))
    expected = reasoner.reason([ITEMS[0]], 24)[0]
    poisoned = replace(image, input=replace(image.input, images=(bad,)))
    futures = reasoner.submit([poisoned, reasoner.prepare(ITEMS[0], 24)])
    with pytest.raises(InternalError) as caught:
        futures[0].result(WAIT_S)
    assert caught.value.reason == "NAN"
    assert futures[1].result(WAIT_S).reasoning == expected


def test_numbers_that_are_none_do_not_stay_in_the_slot(reasoner):
    """The next sequence there is shorter: places behind it still hold what the broken one left."""
    expected = reasoner.reason([ITEMS[0]], 24)[0]
    long = reasoner.prepare(item("the smiling dog face " * 4, 78), 24)
    (one,) = long.input.images
    bad = replace(one, key="nan as well", patches=np.full_like(one.patches, np.nan))
    poisoned = replace(long, input=replace(long.input, images=(bad,)))
    assert long.input.tokens > 32 > reasoner.prepare(ITEMS[0], 24).input.tokens
    with pytest.raises(InternalError, match="not finite"):
        reasoner.submit([poisoned])[0].result(WAIT_S)
    assert reasoner.reason([ITEMS[0]], 24)[0] == expected


def test_a_round_that_fails_loses_its_sequences_and_no_more(reasoner, caplog):
    """After a device error the caches are made anew and the thread serves on."""
    expected = reasoner.reason([ITEMS[0]], 24)[0]
    table = reasoner.table
    run = table.run

    def failing(name, *arguments):
        if name == "decode":
            del table.run
            raise RuntimeError("device lost")
        return run(name, *arguments)

    table.run = failing
    (future,) = reasoner.submit([reasoner.prepare(ITEMS[0], 24)])
    with pytest.raises(InternalError) as caught:
        future.result(WAIT_S)
    assert "device lost" not in caught.value.message
    assert reasoner.reason([ITEMS[0]], 24)[0] == expected


def test_a_device_lost_while_admitting_answers_all_that_were_taken(reasoner):
    """Also those behind the prompt at fault, which have no slot yet."""
    expected = reasoner.reason([ITEMS[0]], 24)[0]
    loop, table, run = reasoner.loop, reasoner.table, reasoner.table.run
    entered, go = threading.Event(), threading.Event()

    def failing(name, *arguments):
        if name == "decode":  # holds the loop, so that all prompts are taken together
            entered.set()
            assert go.wait(WAIT_S)
        elif go.is_set():
            if failing.first:  # a failure before the caches were taken: one by one then
                failing.first = False
                raise RuntimeError("bad batch")
            loop._state = None
            raise RuntimeError("device lost")
        return run(name, *arguments)

    failing.first = True
    table.run = failing
    try:
        (running,) = reasoner.submit([reasoner.prepare(ITEMS[0], 24)])
        assert entered.wait(WAIT_S)
        futures = reasoner.submit([reasoner.prepare(ITEMS[0], 24) for _ in range(3)])
        go.set()
        for future in (running, *futures):
            with pytest.raises(InternalError):
                future.result(WAIT_S)
    finally:
        del table.run
    assert reasoner.reason([ITEMS[0]], 24)[0] == expected


def test_nothing_compiles_over_200_random_requests(reasoner):
    embedder, reranker = tiny_models.embedder(), tiny_models.reranker()
    reasoner.reason(ITEMS, 24)
    words = "a smiling cat face with a dark skin tone thing yes no".split()
    rng = random.Random(0)
    before = backend_compiles()
    for n in range(200):
        text = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        images = [100 + rng.randint(0, 9) for _ in range(rng.randint(0, 1))]
        if n % 3 == 0:
            items = [item(text, *images)] * rng.randint(1, 5)
            reasoner.reason(items, rng.randint(0, 24))
        elif n % 3 == 1:
            one = item(text, *images)
            embedder.embed([EmbedItem(one.content, one.side, text)] * rng.randint(1, 9))
        else:
            candidates = rng.choices(words, k=rng.randint(0, 12))
            assert len(reranker.score(text, candidates)) == len(candidates)
    assert backend_compiles() == before
    assert reasoner.compile_count == before


def test_a_tokenizer_without_think_tokens_still_gets_one_close(tmp_path):
    directory = tiny_models.write_model(
        tmp_path / "plain",
        family="qwen3",
        roles=["reasoner"],
        think_tags=False,
        buckets={"prefill": [[1, 32]], "decode": [[1, 56]]},
    )
    with Reasoner.from_pretrained(directory) as role:
        (reasoning,) = role.reason([item("a cat")], 24)
        assert reasoning.text.count("</think>") == 1
        assert reasoning.tokens <= 24
