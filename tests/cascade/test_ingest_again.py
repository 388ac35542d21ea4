"""Documents that come again: what is stored is not made a second time."""

from dataclasses import replace

import numpy as np
import pytest

from tests.cascade.fakes import (
    FakeIndex,
    RememberingIndex,
)
from tests.cascade.ingesting import SKIPPED, STORED, System, docs, outcome
from tte_jax.content import NO_REASONING, Content, Document

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


def test_a_flag_is_no_number():
    """To Python they are equal, to a filter they are not."""
    system = System()
    given = [Document("a", Content.of("a"), {"public": 1, "n": 2})]
    system.ingest(given)
    assert outcome(system.ingest(given)) == {0: ("a", SKIPPED)}
    changed = [Document("a", Content.of("a"), {"public": True, "n": 2})]
    assert outcome(system.ingest(changed)) == {0: ("a", STORED)}
    assert system.index.entries["a"].document.metadata["public"] is True
    again = [Document("a", Content.of("a"), {"public": True, "n": 2.0})]
    assert outcome(system.ingest(again)) == {0: ("a", SKIPPED)}


def test_going_back_to_what_is_stored_within_one_stream_is_not_skipped():
    system = System()
    old, new = docs("a")[0], Document("a", Content.of("newer"))
    system.ingest([old])
    system.index.delay = 5.0  # `new` is still on its way when `old` is looked up
    updates = system.ingest([new, old], batch_documents=1)
    assert outcome(updates) == {0: ("a", STORED), 1: ("a", STORED)}
    assert system.index.entries["a"].document.content.text == "text a"


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
