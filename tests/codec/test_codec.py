"""What goes over the wire comes back equal, and what exceeds a limit names its field."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tte.v1 import content_pb2, filter_pb2, reasoner_pb2, retrieval_pb2, vector_pb2
from tte_jax import codec, limits
from tte_jax.cascade.messages import (
    Degraded,
    Include,
    IngestOptions,
    IngestUpdate,
    ItemResult,
    ItemState,
    SearchQuery,
    SearchStage,
    SearchUpdate,
)
from tte_jax.codec import search
from tte_jax.content import (
    Budget,
    Candidate,
    Content,
    Document,
    Media,
    MediaKind,
    Reasoning,
    Side,
    Task,
    Text,
    Usage,
)
from tte_jax.errors import (
    InvalidInputError,
    OverloadedError,
    StorageFullError,
    TteError,
    UnavailableError,
)
from tte_jax.filters import AllOf, AnyOf, Equals, Not, OneOf, Prefix, Range
from tte_jax.stages import EmbedItem, Hit, IndexEntry, ReasonItem

few = settings(max_examples=50, deadline=None)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
counts = st.integers(0, 2**31)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
float32 = st.floats(-1, 1, width=32)
seconds = st.floats(0, 1e3)
values = st.one_of(
    texts,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
metadata = st.dictionaries(names, values, max_size=4)
parts = st.one_of(
    texts.map(Text),
    st.builds(
        Media, st.binary(min_size=1, max_size=9), st.sampled_from(["image", "video"]).map(MediaKind)
    ),
    st.builds(
        Media, st.binary(min_size=1, max_size=9), st.just(MediaKind.PAGE), st.integers(0, 9_999)
    ),
)
contents = st.lists(parts, min_size=1, max_size=4).map(lambda p: Content(tuple(p)))
contents = contents.filter(lambda c: not c.empty)
reasonings = st.builds(Reasoning, texts, texts, texts, counts, st.booleans())
usages = st.builds(Usage, texts, counts, counts, counts, seconds, seconds, texts, seconds, texts)
leaves = st.one_of(
    st.builds(Equals, names, values),
    st.builds(OneOf, names, st.lists(values, min_size=1, max_size=3).map(tuple)),
    st.builds(Range, names, st.floats(allow_nan=False), st.none() | st.floats(allow_nan=False)),
    st.builds(Prefix, names, texts),
)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(AllOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=5,
)
documents = st.builds(Document, names, contents, metadata, reasonings, counts)
sides = st.sampled_from(Side)


def over_the_wire(message):
    """Serialised and parsed, as a peer would get it."""
    return type(message).FromString(message.SerializeToString())


def typed(value):
    """With types, because 1 == 1.0 == True."""
    if dataclasses.is_dataclass(value):
        return type(value), [typed(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        return [typed(v) for v in value]
    if isinstance(value, dict):
        return {k: typed(v) for k, v in value.items()}
    return type(value), value


@few
@given(contents)
def test_contents_come_back(content: Content) -> None:
    back = codec.decode_content(over_the_wire(codec.encode_content(content)), "query")
    assert back == content and back.content_hash == content.content_hash


@few
@given(documents)
def test_documents_come_back(document: Document) -> None:
    message = over_the_wire(codec.encode_document(document))
    assert typed(codec.decode_document(message, "document")) == typed(document)


@few
@given(filters.filter(lambda f: depth(f) <= limits.MAX_FILTER_DEPTH))
def test_filters_come_back(condition) -> None:
    message = over_the_wire(codec.encode_filter(condition))
    assert typed(codec.decode_filter(message, "filter")) == typed(condition)


def depth(condition) -> int:
    if isinstance(condition, AllOf | AnyOf):
        return 1 + max(depth(f) for f in condition.filters)
    return 1 + depth(condition.filter) if isinstance(condition, Not) else 1


@few
@given(usages, reasonings)
def test_usages_and_reasonings_come_back(usage: Usage, reasoning: Reasoning) -> None:
    assert codec.decode_usage(over_the_wire(codec.encode_usage(usage))) == usage
    assert codec.decode_reasoning(over_the_wire(codec.encode_reasoning(reasoning))) == reasoning


@few
@given(st.builds(ReasonItem, contents, sides, texts, st.none() | st.just(Task.COMPOSED)))
def test_reason_items_come_back(item: ReasonItem) -> None:
    assert codec.decode_reason_item(over_the_wire(codec.encode_reason_item(item)), "i") == item


@few
@given(contents, contents, texts)
def test_rewrites_come_back(candidate: Content, query: Content, text: str) -> None:
    item = ReasonItem(candidate, Side.DOCUMENT, "", Task.REWRITE, query, text, text + "c")
    message = over_the_wire(codec.encode_reason_item(item))
    assert codec.decode_reason_item(message, "i") == item
    message.task = content_pb2.TASK_UNSPECIFIED  # the context alone makes it a rewrite
    assert codec.decode_reason_item(message, "i") == item


@few
@given(st.builds(EmbedItem, contents, sides, texts, texts))
def test_embed_items_come_back(item: EmbedItem) -> None:
    assert codec.decode_embed_item(over_the_wire(codec.encode_embed_item(item)), "i") == item


@few
@given(documents, st.lists(float32, min_size=1, max_size=5), texts)
def test_entries_come_back(document: Document, vector: list[float], version: str) -> None:
    entry = IndexEntry(document, np.float32(vector), version, version + "e")
    back = codec.decode_entry(over_the_wire(codec.encode_entry(entry)), "entry")
    assert back.document == document and back.embedder_version == version + "e"
    assert back.vector.dtype == np.float32 and back.vector.tolist() == vector


@few
@given(st.builds(Hit, names, float32, reasonings, metadata))
def test_hits_come_back(hit: Hit) -> None:
    assert typed(codec.decode_hit(over_the_wire(codec.encode_hit(hit)))) == typed(hit)


@few
@given(
    st.builds(
        SearchQuery,
        contents,
        st.integers(1, 1000),
        texts,
        st.none() | leaves,
        st.builds(
            Budget,
            st.integers(0, 4096),
            st.integers(1, 1000),
            st.integers(0, 50),
            st.integers(0, 4096),
            st.integers(0, 256),
        ),
        st.builds(Include, st.booleans(), st.booleans(), st.booleans()),
        st.none() | seconds,
    )
)
def test_searches_come_back(query: SearchQuery) -> None:
    message = over_the_wire(search.encode_query(query))
    back = search.decode_query(message, deadline_s=query.deadline_s)
    assert typed(back) == typed(query)


candidates = st.builds(
    Candidate, names, float32, st.none() | float32, reasonings, st.none() | reasonings, metadata
)
updates = st.builds(
    SearchUpdate,
    st.sampled_from(SearchStage),
    st.lists(candidates, max_size=3).map(tuple),
    st.booleans(),
    reasonings,
    st.lists(usages, max_size=2).map(tuple),
    st.lists(st.builds(Degraded, texts, texts, texts), max_size=2).map(tuple),
)


@few
@given(updates)
def test_search_updates_come_back(update: SearchUpdate) -> None:
    back = search.decode_update(over_the_wire(search.encode_update(update)))
    assert typed(back) == typed(update)


def test_scores_that_were_not_asked_for_are_not_sent() -> None:
    update = SearchUpdate(SearchStage.RERANKED, (Candidate("a", 0.5, 0.25),), True)
    sent = search.encode_update(update, scores=False).candidates[0]
    assert not sent.HasField("cosine") and not sent.HasField("rerank")


def test_an_empty_search_request_has_the_defaults() -> None:
    request = retrieval_pb2.SearchRequest()
    request.query.parts.add(text="cat")
    assert search.decode_query(request) == SearchQuery(Content.of("cat"))


def test_an_explicit_zero_switches_a_stage_off() -> None:
    request = retrieval_pb2.SearchRequest()
    request.query.parts.add(text="cat")
    request.budget.rerank_depth = 0
    assert search.decode_query(request).budget == Budget(rerank_depth=0)


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("bad", field="document.id"),
        StorageFullError("full"),
        OverloadedError("busy"),
        UnavailableError("down"),
        TteError("odd"),
    ],
)
def test_ingest_updates_come_back_with_their_errors(error: TteError) -> None:
    update = IngestUpdate(
        results=(
            ItemResult(0, "a", ItemState.STORED),
            ItemResult(1, "b", ItemState.SKIPPED),
            ItemResult(2, "", ItemState.FAILED, error),
        ),
        received=4,
        stored=1,
        skipped=1,
        failed=1,
        sequence=9,
        usage=(Usage("embed", 3),),
        final=True,
    )
    back = search.decode_ingest_update(over_the_wire(search.encode_ingest_update(update)))
    assert dataclasses.replace(back, results=()) == dataclasses.replace(update, results=())
    assert back.results[:2] == update.results[:2]
    got = back.results[2].error
    assert got is not None and (got.code, got.reason, got.message) == (
        error.code,
        error.reason,
        error.message,
    )
    assert getattr(got, "field", None) == getattr(error, "field", None)
    assert isinstance(got, type(error)) or type(error) is TteError


@few
@given(documents, st.builds(IngestOptions, st.integers(0, 4096), texts, st.booleans()))
def test_ingest_inputs_come_back(document: Document, options: IngestOptions) -> None:
    sent = over_the_wire(search.encode_ingest_document(document)).document
    expected = Document(document.id, document.content, document.metadata)
    assert typed(search.decode_ingest_document(sent)) == typed(expected)
    first = over_the_wire(search.encode_ingest_options(options)).options
    assert search.decode_ingest_options(first) == options


def test_half_precision_vectors_are_accepted() -> None:
    half = np.array([1.5, -2.0], "<f2")
    message = vector_pb2.Vector(data=half.tobytes(), dtype=vector_pb2.DTYPE_FLOAT16, dimension=2)
    assert codec.decode_vector(message, "vector").tolist() == [1.5, -2.0]


def content(**parts) -> content_pb2.Content:
    return content_pb2.Content(parts=[content_pb2.Part(**parts)])


def equals(value=None) -> filter_pb2.Filter:
    inner = filter_pb2.Filter.Equals(field="f")
    if value is not None:
        inner.value.double_value = value
    return filter_pb2.Filter(equals=inner)


def nested(levels: int) -> filter_pb2.Filter:
    return filter_pb2.Filter(negated=nested(levels - 1)) if levels else equals(1)


def wide(count: int) -> filter_pb2.Filter:
    group = filter_pb2.Filter.Group(filters=[equals(1)] * count)
    return filter_pb2.Filter(any_of=group)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (content_pb2.Content(), "c"),
        (content(text=" \n"), "c"),
        (content(), "c.parts[0]"),
        (content(text="x" * 8_193), "c.parts[0].text"),
        (content(image=content_pb2.Image()), "c.parts[0].image.data"),
        (content(page=content_pb2.Page(data=b"p", page=10_000)), "c.parts[0].page.page"),
        (content_pb2.Content(parts=[content_pb2.Part(text="x")] * 17), "c.parts"),
    ],
)
def test_bad_contents_name_their_field(message: content_pb2.Content, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        codec.decode_content(message, "c")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (filter_pb2.Filter(), "f"),
        (equals(), "f.equals.value"),
        (equals(float("inf")), "f.equals.value"),
        (filter_pb2.Filter(range=filter_pb2.Filter.Range(field="f")), "f.range"),
        (filter_pb2.Filter(one_of=filter_pb2.Filter.OneOf(field="f")), "f.one_of.values"),
        (filter_pb2.Filter(all_of=filter_pb2.Filter.Group()), "f.all_of.filters"),
        (filter_pb2.Filter(prefix=filter_pb2.Filter.Prefix()), "f.prefix.field"),
        (nested(8), "f" + ".negated" * 8),
        (wide(256), "f"),
    ],
)
def test_bad_filters_name_their_field(message: filter_pb2.Filter, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        codec.decode_filter(message, "f")
    assert caught.value.field == field


def test_filters_at_the_limits_are_accepted() -> None:
    assert depth(codec.decode_filter(nested(7), "f")) == 8
    assert len(codec.decode_filter(wide(255), "f").filters) == 255  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": vector_pb2.DTYPE_UNSPECIFIED}, "v.dtype"),
        ({"dimension": 0}, "v.dimension"),
        ({"dimension": 8_193}, "v.dimension"),
        ({"dimension": 3}, "v.data"),
        ({"data": np.float32([1, np.nan]).tobytes()}, "v.data"),
    ],
)
def test_bad_vectors_name_their_field(change: dict, field: str) -> None:
    good = {"data": b"\0" * 8, "dtype": vector_pb2.DTYPE_FLOAT32, "dimension": 2}
    with pytest.raises(InvalidInputError) as caught:
        codec.decode_vector(vector_pb2.Vector(**{**good, **change}), "v")
    assert caught.value.field == field
    with pytest.raises(InvalidInputError, match=r"v\[1\]") as caught:
        codec.decode_vectors(
            [vector_pb2.Vector(**good), vector_pb2.Vector(**{**good, **change})], "v"
        )
    assert caught.value.field is not None and caught.value.field.startswith("v[1]")


def test_vectors_of_a_batch_are_what_each_is_alone():
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    whole = [codec.encode_vector(row) for row in rows]
    half = vector_pb2.Vector(
        data=rows[2].astype("<f2").tobytes(), dtype=vector_pb2.DTYPE_FLOAT16, dimension=7
    )
    for messages in (whole, [*whole[:2], half, *whole[3:]], [half]):
        together = codec.decode_vectors(messages, "v")
        assert together.dtype == np.float32 and together.flags.writeable
        np.testing.assert_array_equal(together, [codec.decode_vector(m, "v") for m in messages])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"side": content_pb2.SIDE_UNSPECIFIED}, "i.side"),
        ({"side": 9}, "i.side"),
        ({"task": 9}, "i.task"),
        ({"task": content_pb2.TASK_REWRITE}, "i.task"),
        ({"task": content_pb2.TASK_TEXT, "rewrite": reasoner_pb2.RewriteContext()}, "i.task"),
        ({"rewrite": reasoner_pb2.RewriteContext()}, "i.rewrite.query"),
        ({"instruction": "x" * 2_049}, "i.instruction"),
    ],
)
def test_bad_reason_inputs_name_their_field(change: dict, field: str) -> None:
    good = {"content": content(text="x"), "side": content_pb2.SIDE_QUERY}
    with pytest.raises(InvalidInputError) as caught:
        codec.decode_reason_item(reasoner_pb2.ReasonInput(**{**good, **change}), "i")
    assert caught.value.field == field


@pytest.mark.parametrize("value", [2**63, b"bytes", None])
def test_metadata_that_cannot_travel_is_refused(value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        codec.encode_metadata({"k": value})  # type: ignore[dict-item]
    assert caught.value.field == "metadata['k']"


@pytest.mark.parametrize(
    ("name", "value"),
    [("candidates", 0), ("candidates", 1001), ("rerank_depth", 257), ("rewrite_depth", 51)],
)
def test_budgets_out_of_range_name_their_field(name: str, value: int) -> None:
    request = retrieval_pb2.SearchRequest(query=content(text="x"))
    setattr(request.budget, name, value)
    with pytest.raises(InvalidInputError) as caught:
        search.decode_query(request)
    assert caught.value.field == f"budget.{name}"


def test_media_of_more_than_a_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MESSAGE_BYTES", 10)
    fits = codec.encode_content(Content((Media(b"12345"), Text("words beside"), Media(b"67890"))))
    assert codec.decode_content(fits, "query").media[1].data == b"67890"
    large = codec.encode_content(Content((Media(b"12345"), Media(b"678901"))))
    with pytest.raises(InvalidInputError, match="the media of query have 11 bytes") as caught:
        codec.decode_content(large, "query")
    assert (caught.value.field, caught.value.reason) == ("query.parts", "CONTENT_TOO_LARGE")
