"""Ingest over fake stages: isolation, resume, order, back-pressure, failure; virtual clock."""

import asyncio

import numpy as np
import pytest

from tests.cascade.fakes import (
    collect,
    run,
)
from tests.cascade.ingesting import FAILED, STORED, System, docs, errors, outcome, stream
from tte_jax.cascade import IngestOptions, Rejected, SearchQuery
from tte_jax.content import NO_REASONING, Content, Document, Side, Usage
from tte_jax.errors import (
    InternalError,
    InvalidInputError,
    OverloadedError,
    PreconditionError,
    StorageFullError,
    UnavailableError,
)


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
