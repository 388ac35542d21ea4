"""The decode loop reading long prompts in pieces: a reasoner with the `full` prompts."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from tests import tiny_models
from tte_jax.content import Content, Side, Task
from tte_jax.errors import DeadlineExceededError, InternalError
from tte_jax.reasoner import Reasoner
from tte_jax.stages import ReasonItem

WAIT_S = 60.0
CHUNK = 256
BUCKETS = {
    "images": [[4, 16]],
    "prefill": [[4, 64]],
    "append": [[4, 64, 1024], [1, CHUNK, 1024]],
    "prefix": [1024],
    "decode": [[4, 1304]],
    "new_tokens": 24,
    "decode_steps": 4,
}
WHOLE = BUCKETS | {"prefill": [[1, 1280]], "append": []}


def role(name, buckets):
    directory = tiny_models.write_model(
        tiny_models.root() / name, family="qwen2_vl", roles=["reasoner"], buckets=buckets
    )
    spec = json.loads((directory / "tte.json").read_text())
    (directory / "tte.json").write_text(json.dumps(spec | {"prompts": "full"}))
    reasoner = Reasoner.from_pretrained(directory)
    reasoner.warmup()
    return reasoner


@pytest.fixture(scope="module")
def whole():
    with role("chunks-whole", WHOLE) as reasoner:
        yield reasoner


@pytest.fixture(scope="module")
def _reasoner(whole):  # which compiles, too
    with role("chunks", BUCKETS) as reasoner:
        yield reasoner
        assert reasoner.compile_count == reasoner.warm_compile_count, "compiled while serving"


@pytest.fixture
def reasoner(_reasoner):
    """Nothing kept yet, and at its end nothing left."""
    _reasoner.loop.prefixes.cache.clear()
    yield _reasoner
    assert _reasoner.loop.active == 0 and len(_reasoner.queue) == 0


@pytest.fixture
def short(reasoner):
    """A prompt that is read whole at once: as few tokens as the built-in models' prompts have."""
    job = reasoner.prepare(query("a cat"), 24)
    n = 30
    cut = replace(
        job.input,
        ids=job.input.ids[-n:],
        positions=job.input.positions[:, :n],
        next_pos=n,
        is_media=job.input.is_media[-n:],
        prefix_ends=(),
    )
    return replace(job, input=cut)


def query(text, *images, instruction=""):
    content = Content.of(text, *(tiny_models.png(i) for i in images))
    return ReasonItem(content, Side.QUERY, instruction=instruction)


def rewrite(number, wanted="a black cat"):
    return ReasonItem(
        Content.of("", tiny_models.png(number)),
        Side.DOCUMENT,
        task=Task.REWRITE,
        query=Content.of(wanted),
        candidate_reasoning=f"<think>a face</think>\nAnswer: cat {number}",
    )


def recording(reasoner, monkeypatch):
    """The names of the programs that run, in order."""
    names, run = [], reasoner.table.run

    def noting(name, *arguments):
        names.append(name)
        return run(name, *arguments)

    monkeypatch.setattr(reasoner.table, "run", noting)
    return names


def test_prompts_read_in_pieces_are_reasoned_on_as_whole_ones(reasoner, whole):
    items = [query("a cat"), query("", 1), query("red", 2, 3), rewrite(4), rewrite(5)]
    expected = whole.reason(items, 24)
    assert len({r.text for r in expected}) > 2
    assert reasoner.reason(items, 24) == expected  # nothing kept
    assert reasoner.reason(items, 24) == expected  # all kept
    assert [reasoner.reason([one], 24)[0] for one in items] == expected


def test_reused_tokens_are_counted(reasoner):
    prompt = reasoner.served.prompts.reason(query("a cat"))
    (end,) = prompt.prefix_ends
    stats = reasoner.queue.stats
    counted, read = stats.cached_tokens, stats.tokens
    _, first = reasoner.run([query("a cat")], 24)
    _, second = reasoner.run([query("the smiling dog face")], 24)
    assert (first.cached_tokens, second.cached_tokens) == (0, end)
    assert stats.cached_tokens == counted + end
    assert stats.tokens == read + first.tokens_in + second.tokens_in - end
    _, other = reasoner.run([query("a cat", instruction="Find cats.")], 24)
    assert other.cached_tokens == 0


def test_rewrites_of_one_search_share_its_query(reasoner, whole):
    items = [rewrite(n) for n in range(20, 26)]  # more than slots
    ends = reasoner.served.prompts.reason(items[0]).prefix_ends
    assert len(ends) == 2 and ends[0] < ends[1]
    futures = reasoner.submit([reasoner.prepare(one, 24) for one in items])
    finished = [f.result(WAIT_S) for f in futures]
    assert [f.usage.cached_tokens for f in finished] == [0] + [ends[1]] * 5
    assert [f.reasoning for f in finished] == whole.reason(items, 24)
    # Another search has the instruction in common; the images' features are cached by now.
    _, usage = reasoner.run([rewrite(20, wanted="a red face")], 24)
    assert usage.cached_tokens == ends[0] + 4


def test_who_decodes_gets_tokens_between_the_pieces_of_a_long_prompt(reasoner, short, monkeypatch):
    names = recording(reasoner, monkeypatch)
    long = reasoner.prepare(query("a cat"), 24)
    pieces = -(-long.input.tokens // CHUNK)
    assert pieces >= 3
    shown, late = [], []

    def listener(ids, last):
        shown.append((len(names), len(ids)))
        if not late:
            late.append(reasoner.loop.submit([long])[0])

    running = reasoner.loop.submit([replace(short, on_tokens=listener), short])
    assert len(running[0].result(WAIT_S).tokens) == 24
    assert late[0].result(WAIT_S).tokens
    at = [i for i, name in enumerate(names) if name == "append"]
    assert len(at) == pieces
    for one, next_one in zip(at, at[1:], strict=False):
        between = names[one + 1 : next_one]
        assert between.count("decode") == 1, names
        assert any(one < when <= next_one and count == 4 for when, count in shown)


def test_new_short_prompts_pass_a_long_one(reasoner, short, monkeypatch):
    """They come while it is read, and are answered before it has its first token."""
    names = recording(reasoner, monkeypatch)
    run, answered, order = reasoner.table.run, [], []

    def coming(name, *arguments):
        if name == "append" and not answered:
            answered.append(reasoner.loop.submit([replace(short, on_tokens=note("short"))])[0])
        return run(name, *arguments)

    def note(who):
        return lambda ids, last: order.append(who)

    monkeypatch.setattr(reasoner.table, "run", coming)
    long = replace(reasoner.prepare(query("a cat"), 24), on_tokens=note("long"))
    reasoner.loop.submit([long])[0].result(WAIT_S)
    answered[0].result(WAIT_S)
    assert order[0] == "short" and "long" in order
    assert names.count("prefill") == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_prompt_that_nobody_wants_any_more_is_not_read_on(reasoner, monkeypatch, how):
    loop, run = reasoner.loop, reasoner.table.run
    entries, appends, entered, go = [], [], threading.Event(), threading.Event()

    def held(name, *arguments):
        if name == "append":
            appends.append(name)
            entered.set()
            assert go.wait(WAIT_S)
        return run(name, *arguments)

    put = loop.queue.put

    def catching(some, **kwargs):
        entries.extend(some)
        put(some, **kwargs)

    monkeypatch.setattr(reasoner.table, "run", held)
    monkeypatch.setattr(loop.queue, "put", catching)
    (future,) = loop.submit([reasoner.prepare(query("a cat"), 24)], deadline=time.monotonic() + 999)
    assert entered.wait(WAIT_S)
    if how == "cancelled":
        future.cancel()
    else:
        entries[0].deadline = time.monotonic() - 1.0
    go.set()
    with pytest.raises((CancelledError, DeadlineExceededError)) as caught:
        future.result(WAIT_S)
    assert how == "cancelled" or "after 0 of at most 24 tokens" in str(caught.value)
    while loop.active:
        time.sleep(0.01)
    assert len(appends) == 1
    assert len(loop.prefixes.cache) == 0  # its beginning was not read to the end
    assert reasoner.reason([query("red")], 24)[0].tokens > 0


def test_a_follower_takes_over_when_the_first_of_them_goes(reasoner, whole, monkeypatch):
    run, first = reasoner.table.run, []

    def going(name, *arguments):
        if name == "append" and not first[0].done():
            first[0].cancel()
        return run(name, *arguments)

    jobs = [reasoner.prepare(query(text), 24) for text in ("a cat", "red", "a dog face")]
    ready = threading.Event()

    def waiting(name, *arguments):
        assert ready.wait(WAIT_S)
        return going(name, *arguments)

    monkeypatch.setattr(reasoner.table, "run", waiting)
    futures = reasoner.loop.submit(jobs)
    first.append(futures[0])
    ready.set()
    made = [f.result(WAIT_S) for f in futures[1:]]
    end = jobs[0].input.prefix_ends[0]
    assert [m.cached_tokens for m in made] == [0, end]
    texts = [reasoner.served.prompts.tokenizer.decode(m.tokens).strip() for m in made]
    assert texts == [r.text for r in whole.reason([query("red"), query("a dog face")], 24)]


def test_a_broken_image_fails_in_its_piece_and_alone(reasoner, whole):
    job = reasoner.prepare(query("", 50), 24)
    (one,) = job.input.images
    bad = replace(one, key="nan", patches=np.full_like(one.patches, np.nan))
    poisoned = replace(job, input=replace(job.input, images=(bad,)))
    broken = replace(job, input=replace(job.input, is_media=np.zeros_like(job.input.is_media)))
    good = reasoner.prepare(query("red", 51), 24)
    futures = reasoner.submit([poisoned, good, broken])
    with pytest.raises(InternalError, match="not finite"):
        futures[0].result(WAIT_S)
    with pytest.raises(InternalError, match="vision tokens"):
        futures[2].result(WAIT_S)
    expected = whole.reason([query("red", 51)], 24)[0]
    assert futures[1].result(WAIT_S).reasoning == expected
    assert reasoner.reason([query("red", 51)] * 5, 24) == [expected] * 5


def test_a_lost_device_loses_what_was_kept(reasoner, whole, monkeypatch):
    expected = whole.reason([query("red")], 24)[0]
    reasoner.reason([query("red")], 24)
    assert len(reasoner.loop.prefixes.cache) == 1
    run = reasoner.table.run

    def failing(name, *arguments):
        monkeypatch.setattr(reasoner.table, "run", run)
        raise RuntimeError("device lost")

    monkeypatch.setattr(reasoner.table, "run", failing)
    (future,) = reasoner.submit([reasoner.prepare(query("red"), 24)])
    with pytest.raises(InternalError):
        future.result(WAIT_S)
    assert len(reasoner.loop.prefixes.cache) == 0
    assert reasoner.reason([query("red")], 24)[0] == expected
