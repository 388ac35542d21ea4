"""Ingest over fake stages: isolation, resume, order, back-pressure, failure; virtual clock."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.cascade.fakes import (
    FakeEmbedder,
    FakeIndex,
    FakeReasoner,
    FakeReranker,
    RememberingIndex,
    ResumableIndex,
    collect,
    run,
)
from tte_jax.cascade import Cascade, IngestOptions, ItemState, Rejected, SearchQuery
from tte_jax.content import NO_REASONING, Content, Document, Side, Usage
from tte_jax.errors import (
    InternalError,
    InvalidInputError,
    OverloadedError,
    PreconditionError,
    StorageFullError,
    UnavailableError,
)

STORED, SKIPPED, FAILED = ItemState.STORED, ItemState.SKIPPED, ItemState.FAILED


class System:
    def __init__(self, index=None) -> None:
        self.reasoner, self.embedder = FakeReasoner(), FakeEmbedder()
        self.index = index or ResumableIndex()
        self.cascade = Cascade(self.reasoner, self.embedder, self.index, FakeReranker())

    def ingest(self, documents, **options):
        return run(collect(self.cascade.ingest(stream(documents), IngestOptions(**options))))


async def stream(items):
    for item in items:
        yield item


def docs(*texts, **metadata):
    return [Document(text, Content.of(f"text {text}"), metadata) for text in texts]


def outcome(updates):
    """position → (id, state), each position exactly once."""
    results = [result for update in updates for result in update.results]
    assert len({r.position for r in results}) == len(results)
    return {r.position: (r.id, r.state) for r in sorted(results, key=lambda r: r.position)}


def errors(updates):
    return {r.id: r.error for u in updates for r in u.results if r.error}


def test_documents_are_reasoned_about_embedded_and_stored():
    system = System()
    updates = system.ingest(docs("a", "b", "c", color="red"), instruction="emoji")
    assert outcome(updates) == {0: ("a", STORED), 1: ("b", STORED), 2: ("c", STORED)}
    last = updates[-1]
    assert (last.final, last.received, last.stored, last.skipped, last.failed) == (True, 3, 3, 0, 0)
    assert last.sequence == 3
    assert [u.final for u in updates[:-1]] == [False] * (len(updates) - 1)
    entry = system.index.entries["a"]
    assert entry.document.metadata == {"color": "red"}
    assert entry.document.reasoning.think == "text a"
    assert entry.embedder_version == "embedder-1"
    assert entry.reasoner_version.startswith("reasoner-1@64#")
    assert float(np.linalg.norm(entry.vector)) == pytest.approx(1)
    item = system.reasoner.items[0]
    assert (item.side, item.instruction) == (Side.DOCUMENT, "emoji")
    usage = {u.stage: u for u in last.usage}
    assert (usage["reason"].tokens_in, usage["reason"].tokens_out) == (21, 12)
    assert usage["embed"].tokens_in == 15


def test_a_stored_document_is_found_by_the_next_search():
    system = System()

    async def main():
        async for update in system.cascade.ingest(stream(docs("zebra"))):
            if update.results:
                break
        return await collect(system.cascade.search(SearchQuery(Content.of("zebra"))))

    assert run(main())[-1].results[0].id == "zebra"


def test_without_reasoning_documents_are_embedded_as_they_are():
    system = System()
    system.ingest(docs("a"), reasoning_tokens=0)
    assert system.reasoner.calls == 0
    entry = system.index.entries["a"]
    assert (entry.document.reasoning, entry.reasoner_version) == (NO_REASONING, "")


def test_batches_by_count_and_by_bytes():
    system = System()
    system.ingest(docs(*"abcdefg"), batch_documents=3)
    assert [len(batch) for batch in system.index.batches] == [3, 3, 1]
    big = [Document(i, Content.of("", bytes(100))) for i in "abcd"]
    system = System()
    system.ingest(big, batch_bytes=250)
    assert [len(batch) for batch in system.index.batches] == [2, 2]
    system = System()
    system.ingest(big, batch_bytes=10)  # each alone is larger
    assert [len(batch) for batch in system.index.batches] == [1, 1, 1, 1]


def test_a_batch_does_not_wait_for_a_sender_who_waits_for_it():
    system = System()
    answers: asyncio.Queue = asyncio.Queue()

    async def polite():
        for document in docs("a", "b"):
            yield document
            assert await answers.get() == document.id

    async def main():
        async for update in system.cascade.ingest(polite(), IngestOptions(batch_documents=100)):
            for result in update.results:
                answers.put_nowait(result.id)

    run(main())
    assert system.index.batches == [["a"], ["b"]]


def test_stages_overlap():
    """Four batches through three stages of 10 s each: 60 s, where one by one is 120 s."""
    system = System()
    for stage in (system.reasoner, system.embedder, system.index):
        stage.delay = 10.0

    async def main():
        began = asyncio.get_running_loop().time()
        options = IngestOptions(batch_documents=1, skip_stored=False)
        await collect(system.cascade.ingest(stream(docs(*"abcd")), options))
        return asyncio.get_running_loop().time() - began

    assert run(main()) == pytest.approx(60.0)


def test_a_slow_consumer_holds_back_the_sender():
    system = System()
    sent = []

    async def endless():
        for number in range(10_000):
            sent.append(number)
            yield Document(f"d{number}", Content.of("text"))

    async def main():
        options = IngestOptions(batch_documents=1)
        async for update in system.cascade.ingest(endless(), options):
            if update.stored:
                await asyncio.sleep(60)
                assert len(sent) < 20
                return

    run(main())


# --- one bad document fails alone ---


@pytest.mark.parametrize("stage", ["reasoner", "embedder"])
def test_an_unreadable_image_fails_alone(stage):
    system = System()

    def refuse(item):
        if item.content.text == "text bad":
            return InvalidInputError(
                "not an image", field="inputs[3].content.parts[0].image.data", reason="UNREADABLE"
            )

    getattr(system, stage).refuse = refuse
    updates = system.ingest(docs("a", "b", "c", "bad", "d", "e", "f"))
    assert outcome(updates)[3] == ("bad", FAILED)
    assert [state for _, state in outcome(updates).values()].count(STORED) == 6
    assert sorted(system.index.entries) == ["a", "b", "c", "d", "e", "f"]
    error = errors(updates)["bad"]
    assert (error.reason, error.field) == ("UNREADABLE", "document.content.parts[0].image.data")
    assert (updates[-1].failed, updates[-1].stored, updates[-1].received) == (1, 6, 7)


def test_several_bad_documents_and_nothing_else():
    system = System()
    system.reasoner.refuse = lambda item: InvalidInputError("no")
    updates = system.ingest(docs(*"abc"))
    assert [state for _, state in outcome(updates).values()] == [FAILED] * 3
    assert updates[-1].final
    assert system.index.entries == {}


def test_a_vector_that_is_no_number_fails_alone():
    system = System()
    embed = system.embedder.embed

    async def sometimes_nan(items, **kwargs):
        vectors, usage = await embed(items, **kwargs)
        for row, item in zip(vectors, items, strict=True):
            if item.content.text == "text nan":
                row[:] = np.nan
        return vectors, usage

    system.embedder.embed = sometimes_nan
    updates = system.ingest(docs("a", "nan", "b"))
    assert sorted(system.index.entries) == ["a", "b"]
    assert isinstance(errors(updates)["nan"], InternalError)


def test_metadata_that_the_index_refuses_fails_alone():
    system = System()
    upsert = system.index.upsert

    async def picky(entries, **kwargs):
        if any("bad" in entry.document.metadata for entry in entries):
            raise InvalidInputError("metadata", field="entries[1].document.metadata")
        return await upsert(entries, **kwargs)

    system.index.upsert = picky
    updates = system.ingest([*docs("a"), *docs("x", bad=1), *docs("b")])
    assert outcome(updates) == {0: ("a", STORED), 1: ("x", FAILED), 2: ("b", STORED)}
    assert errors(updates)["x"].field == "document.metadata"


def test_documents_that_are_none_fail_without_a_model():
    system = System()
    bad = InvalidInputError("zero bytes", field="document.content.parts[0].image.data")
    inputs = [
        Document("", Content.of("text")),
        Document("empty", Content.of("  ")),
        Rejected("broken", bad),
        *docs("fine"),
    ]
    updates = system.ingest(inputs)
    assert [state for _, state in outcome(updates).values()] == [FAILED, FAILED, FAILED, STORED]
    found = errors(updates)
    assert found["broken"] is bad
    assert found[""].field == "document.id"
    assert (found["empty"].field, found["empty"].reason) == ("document.content", "EMPTY_DOCUMENT")
    assert len(system.reasoner.items) == 1


# --- resume ---


def test_sending_everything_again_costs_nothing():
    system = System()
    system.ingest(docs(*"abc"))
    calls = len(system.reasoner.items), len(system.embedder.items)
    updates = system.ingest(docs(*"abcd"))
    states = [state for _, state in outcome(updates).values()]
    assert states == [SKIPPED, SKIPPED, SKIPPED, STORED]
    assert (updates[-1].skipped, updates[-1].stored) == (3, 1)
    # One tiny question each for the models' versions, and the new document.
    assert (len(system.reasoner.items), len(system.embedder.items)) == (calls[0] + 2, calls[1] + 2)
    assert system.reasoner.max_tokens[-2:] == [1, 64]


@pytest.mark.parametrize(
    "change",
    ["content", "metadata", "reasoner", "embedder", "budget", "instruction", "no reasoning"],
)
def test_whatever_changed_is_made_again(change):
    system = System()
    system.ingest(docs("a", "b"))
    documents, options = docs("a", "b"), {}
    if change == "content":
        documents = [replace(d, content=Content.of("other")) for d in documents]
    elif change == "metadata":
        documents = docs("a", "b", n=1)
    elif change == "reasoner":
        system.reasoner.version = "reasoner-2"
    elif change == "embedder":
        system.embedder.version = "embedder-2"
    elif change == "budget":
        options = {"reasoning_tokens": 128}
    elif change == "instruction":
        options = {"instruction": "other"}
    else:
        options = {"reasoning_tokens": 0}
    assert {s for _, s in outcome(system.ingest(documents, **options)).values()} == {STORED}
    assert {s for _, s in outcome(system.ingest(documents, **options)).values()} == {SKIPPED}


def test_unchanged_documents_are_redone_on_request_or_when_the_index_cannot_tell():
    system = System()
    system.ingest(docs("a"))
    assert outcome(system.ingest(docs("a"), skip_stored=False)) == {0: ("a", STORED)}
    system = System(FakeIndex())
    system.ingest(docs("a"))
    assert outcome(system.ingest(docs("a"))) == {0: ("a", STORED)}


def test_an_index_that_does_not_tell_the_metadata_makes_documents_again():
    system = System()
    system.ingest(docs("a"))
    existing = system.index.existing

    async def without_metadata(ids, *, timeout_s=None):
        return {id: tuple(v)[:3] for id, v in (await existing(ids)).items()}

    system.index.existing = without_metadata
    assert outcome(system.ingest(docs("a"))) == {0: ("a", STORED)}


# --- the same id twice ---


def test_of_two_documents_with_one_id_the_later_stays():
    system = System()
    first, second = docs("a")[0], Document("a", Content.of("newer"))
    updates = system.ingest([first, *docs("b"), second])
    assert outcome(updates) == {0: ("a", STORED), 1: ("b", STORED), 2: ("a", STORED)}
    assert system.index.batches == [["a", "b"], ["a"]]
    assert system.index.entries["a"].document.content.text == "newer"


def test_going_back_to_what_is_stored_within_one_stream_is_not_skipped():
    system = System()
    old, new = docs("a")[0], Document("a", Content.of("newer"))
    system.ingest([old])
    system.index.delay = 5.0  # `new` is still on its way when `old` is looked up
    updates = system.ingest([new, old], batch_documents=1)
    assert outcome(updates) == {0: ("a", STORED), 1: ("a", STORED)}
    assert system.index.entries["a"].document.content.text == "text a"


# --- sick stages ---


@pytest.mark.parametrize("stage", ["reasoner", "embedder", "index"])
def test_a_stage_that_is_away_for_a_while_is_waited_for(stage):
    system = System()
    getattr(system, stage).errors = [
        UnavailableError("restarting", retry_after_s=5),
        OverloadedError("full", retry_after_s=2),
        UnavailableError("restarting"),
    ]
    updates = system.ingest(docs(*"abc"))
    assert {state for _, state in outcome(updates).values()} == {STORED}
    assert getattr(system, stage).calls == 4


@pytest.mark.parametrize("stage", ["reasoner", "embedder", "index"])
def test_a_stage_that_stays_away_ends_the_ingest_with_its_error(stage):
    system = System()
    getattr(system, stage).broken = UnavailableError("down", retry_after_s=1)

    async def main():
        loop = asyncio.get_running_loop()
        began = loop.time()
        updates = []
        with pytest.raises(UnavailableError, match="down"):
            options = IngestOptions(patience_s=20)
            async for update in system.cascade.ingest(stream(docs(*"abc")), options):
                updates.append(update)
        assert loop.time() - began <= 20
        assert len(asyncio.all_tasks()) == 1
        return updates

    assert [r for u in run(main()) for r in u.results] == []
    assert system.index.entries == {}


def test_what_was_on_its_way_is_settled_before_the_error():
    system = System()
    system.index.delay = 30.0

    def refuse(item):
        return UnavailableError("down") if item.content.text == "text c" else None

    system.reasoner.refuse = refuse
    updates = []

    async def main():
        options = IngestOptions(batch_documents=1, patience_s=0)
        with pytest.raises(UnavailableError):
            async for update in system.cascade.ingest(stream(docs(*"abcd")), options):
                updates.append(update)

    run(main())
    assert outcome(updates) == {0: ("a", STORED), 1: ("b", STORED)}
    assert sorted(system.index.entries) == ["a", "b"]


@pytest.mark.parametrize("error", [StorageFullError("disk full"), PreconditionError("dimension")])
def test_an_index_that_cannot_take_anything_ends_the_ingest(error):
    system = System()
    system.index.broken = error
    with pytest.raises(type(error)):
        system.ingest(docs(*"abc"))
    assert system.index.calls == 1  # asking again would not help


def test_an_input_that_breaks_ends_the_ingest_after_what_came():
    system = System()
    updates = []

    async def breaks():
        for document in docs("a", "b"):
            yield document
        raise InvalidInputError("the stream is no longer readable")

    async def main():
        with pytest.raises(InvalidInputError, match="no longer readable"):
            async for update in system.cascade.ingest(breaks(), IngestOptions(batch_documents=1)):
                updates.append(update)

    run(main())
    assert outcome(updates) == {0: ("a", STORED), 1: ("b", STORED)}


def test_an_empty_stream_is_a_finished_ingest():
    (only,) = System().ingest([])
    assert (only.final, only.received, only.results) == (True, 0, ())


def test_wrong_options_are_refused():
    with pytest.raises(InvalidInputError):
        System().ingest(docs("a"), batch_documents=0)


@pytest.mark.parametrize("stage", ["reasoner", "embedder", "index"])
def test_cancelling_the_consumer_frees_every_stage(stage):
    system = System()
    behaviour = getattr(system, stage)
    behaviour.delay = 100.0

    async def main():
        task = asyncio.create_task(
            collect(
                system.cascade.ingest(stream(docs(*"abcdef")), IngestOptions(batch_documents=1))
            )
        )
        await asyncio.sleep(1.0)
        assert behaviour.running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert behaviour.running == 0
        assert behaviour.cancelled == 1
        assert len(asyncio.all_tasks()) == 1

    run(main())


def test_usage_without_a_model_keeps_the_version_seen_before():
    system = System()
    embed = system.embedder.embed
    calls = []

    async def second_is_silent(items, **kwargs):
        vectors, usage = await embed(items, **kwargs)
        calls.append(1)
        return vectors, usage if len(calls) == 1 else Usage("embed", 5)

    system.embedder.embed = second_is_silent
    last = system.ingest(docs("a", "b"), batch_documents=1)[-1]
    usage = {u.stage: u for u in last.usage}["embed"]
    assert (usage.model_version, usage.tokens_in) == ("embedder-1", 10)


def copies(*names):
    return [Document(name, Content.of("the same picture"), {"name": name}) for name in names]


def test_copies_take_the_ecr_that_the_corpus_has_of_their_content():
    system = System(RememberingIndex())
    system.ingest(copies("one"))
    before = len(system.reasoner.items)
    updates = system.ingest([*copies("two"), *docs("new"), *copies("three")])
    assert outcome(updates) == {0: ("two", STORED), 1: ("new", STORED), 2: ("three", STORED)}
    # One question for the model's version, one for the new document, none for the copies.
    assert [i.content.text for i in system.reasoner.items[before:]] == ["version", "text new"]
    one, two = system.index.entries["one"], system.index.entries["two"]
    assert two.document.reasoning == one.document.reasoning != NO_REASONING
    assert two.reasoner_version == one.reasoner_version != ""
    np.testing.assert_array_equal(two.vector, one.vector)
    assert two.document.metadata == {"name": "two"}
    # Sent again, they are stored unchanged.
    assert {state for _, state in outcome(system.ingest(copies("two", "three"))).values()} == {
        SKIPPED
    }


@pytest.mark.parametrize("options", [{"reasoning_tokens": 9}, {"instruction": "find animals"}])
def test_an_ecr_made_in_another_way_is_not_taken(options):
    system = System(RememberingIndex())
    system.ingest(copies("one"))
    before = len(system.reasoner.items)
    system.ingest(copies("two"), **options)
    assert "the same picture" in [i.content.text for i in system.reasoner.items[before:]]
    assert system.index.entries["two"].reasoner_version != (
        system.index.entries["one"].reasoner_version
    )


def test_copies_are_reasoned_about_again_on_request():
    system = System(RememberingIndex())
    system.ingest(copies("one"))
    before = len(system.reasoner.items)
    system.ingest(copies("two"), skip_stored=False)
    assert [i.content.text for i in system.reasoner.items[before:]] == ["the same picture"]
