"""The vocabulary of `tte_jax.content` as messages of `tte.v1`, and back. Pure functions.

`*_to_proto` builds what is sent, `*_from_proto` reads what came from a peer of ours and trusts its
limits; servers check requests against `tte_jax.limits` on their own.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np

from tte.v1 import (
    budget_pb2,
    content_pb2,
    document_pb2,
    filter_pb2,
    usage_pb2,
    vector_pb2,
)
from tte_jax import filters
from tte_jax.content import (
    NO_REASONING,
    Budget,
    Content,
    Document,
    Media,
    MediaKind,
    Metadata,
    MetadataValue,
    Part,
    Reasoning,
    Side,
    Task,
    Text,
    Usage,
)
from tte_jax.errors import InternalError, InvalidInputError

SIDES = {Side.QUERY: content_pb2.SIDE_QUERY, Side.DOCUMENT: content_pb2.SIDE_DOCUMENT}
TASKS = {
    None: content_pb2.TASK_UNSPECIFIED,
    Task.TEXT: content_pb2.TASK_TEXT,
    Task.IMAGE: content_pb2.TASK_IMAGE,
    Task.COMPOSED: content_pb2.TASK_COMPOSED,
    Task.REWRITE: content_pb2.TASK_REWRITE,
}
_DTYPES = {vector_pb2.DTYPE_FLOAT32: "<f4", vector_pb2.DTYPE_FLOAT16: "<f2"}


# --- contents ---


def content_to_proto(content: Content) -> content_pb2.Content:
    return content_pb2.Content(parts=[_part_to_proto(part) for part in content.parts])


def _part_to_proto(part: Part) -> content_pb2.Part:
    if isinstance(part, Text):
        return content_pb2.Part(text=part.text)
    if part.kind is MediaKind.VIDEO:
        return content_pb2.Part(video=content_pb2.Video(data=part.data))
    if part.kind is MediaKind.PAGE:
        return content_pb2.Part(page=content_pb2.Page(data=part.data, page=part.page))
    return content_pb2.Part(image=content_pb2.Image(data=part.data))


def content_from_proto(message: content_pb2.Content) -> Content:
    """Parts of a kind that this version does not know are left out."""
    parts = (_part_from_proto(part) for part in message.parts)
    return Content(tuple(part for part in parts if part is not None))


def _part_from_proto(message: content_pb2.Part) -> Part | None:
    kind = message.WhichOneof("kind")
    if kind == "text":
        return Text(message.text)
    if kind == "image":
        return Media(message.image.data)
    if kind == "video":
        return Media(message.video.data, MediaKind.VIDEO)
    if kind == "page":
        return Media(message.page.data, MediaKind.PAGE, message.page.page)
    return None


# --- reasonings, usage, budgets ---


def reasoning_to_proto(reasoning: Reasoning) -> content_pb2.Reasoning:
    return content_pb2.Reasoning(
        text=reasoning.text,
        think=reasoning.think,
        answer=reasoning.answer,
        tokens=reasoning.tokens,
        truncated=reasoning.truncated,
    )


def reasoning_from_proto(message: content_pb2.Reasoning) -> Reasoning:
    if not message.text:
        return NO_REASONING
    return Reasoning(message.text, message.think, message.answer, message.tokens, message.truncated)


def usage_to_proto(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        stage=usage.stage,
        tokens_in=usage.tokens_in,
        tokens_out=usage.tokens_out,
        cached_tokens=usage.cached_tokens,
        queue_seconds=usage.queue_s,
        compute_seconds=usage.compute_s,
        model_version=usage.model_version,
        wall_seconds=usage.wall_s,
    )


def usage_from_proto(message: usage_pb2.Usage) -> Usage:
    return Usage(
        stage=message.stage,
        tokens_in=message.tokens_in,
        tokens_out=message.tokens_out,
        cached_tokens=message.cached_tokens,
        queue_s=message.queue_seconds,
        compute_s=message.compute_seconds,
        model_version=message.model_version,
        wall_s=message.wall_seconds,
    )


def budget_to_proto(budget: Budget) -> budget_pb2.Budget:
    """Every field is set, so that a zero stays "off" and does not become the default."""
    return budget_pb2.Budget(
        reasoning_tokens=budget.reasoning_tokens,
        candidates=budget.candidates,
        rewrite_depth=budget.rewrite_depth,
        rewrite_tokens=budget.rewrite_tokens,
        rerank_depth=budget.rerank_depth,
    )


def budget_from_proto(message: budget_pb2.Budget) -> Budget:
    """Unset fields take the defaults of `Budget`."""
    return Budget(**{field.name: value for field, value in message.ListFields()})


# --- metadata, documents, vectors ---


def value_to_proto(value: MetadataValue) -> document_pb2.MetadataValue:
    if isinstance(value, bool):
        return document_pb2.MetadataValue(bool_value=value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidInputError(
                f"the metadata value {value} does not fit into 64 bits; store it as text",
                field="metadata",
            )
        return document_pb2.MetadataValue(int_value=value)
    if isinstance(value, float):
        return document_pb2.MetadataValue(double_value=value)
    return document_pb2.MetadataValue(string_value=value)


def value_from_proto(message: document_pb2.MetadataValue) -> MetadataValue:
    kind = message.WhichOneof("kind")
    return getattr(message, kind) if kind else ""


def metadata_into_proto(
    metadata: Metadata, target: MutableMapping[str, document_pb2.MetadataValue]
) -> None:
    """Fills a message's `metadata` map, whose values protobuf does not let be assigned."""
    for key, value in metadata.items():
        target[key].CopyFrom(value_to_proto(value))


def metadata_from_proto(
    messages: Mapping[str, document_pb2.MetadataValue],
) -> dict[str, MetadataValue]:
    return {key: value_from_proto(message) for key, message in messages.items()}


def document_to_proto(document: Document) -> document_pb2.Document:
    message = document_pb2.Document(
        id=document.id,
        content=content_to_proto(document.content),
        reasoning=reasoning_to_proto(document.reasoning),
        sequence=document.sequence,
    )
    metadata_into_proto(document.metadata, message.metadata)
    return message


def document_from_proto(message: document_pb2.Document) -> Document:
    return Document(
        id=message.id,
        content=content_from_proto(message.content),
        metadata=metadata_from_proto(message.metadata),
        reasoning=reasoning_from_proto(message.reasoning),
        sequence=message.sequence,
    )


def vector_to_proto(vector: np.ndarray) -> vector_pb2.Vector:
    """A [D] array of any float type as little-endian float32."""
    return vector_pb2.Vector(
        data=np.ascontiguousarray(vector, "<f4").tobytes(),
        dtype=vector_pb2.DTYPE_FLOAT32,
        dimension=vector.shape[-1],
    )


def vector_from_proto(message: vector_pb2.Vector) -> np.ndarray:
    """[D] float32.

    Raises:
      InternalError: the dtype is unknown or the bytes do not fit the dimension.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None or len(message.data) != message.dimension * np.dtype(dtype).itemsize:
        raise InternalError(
            f"a vector of dtype {message.dtype} and dimension {message.dimension} came with "
            f"{len(message.data)} bytes; the peer speaks another version of tte.v1"
        )
    return np.frombuffer(message.data, dtype).astype(np.float32)


# --- filters ---


def filter_to_proto(condition: filters.Filter) -> filter_pb2.Filter:
    if isinstance(condition, filters.Equals):
        equals = filter_pb2.Filter.Equals(
            field=condition.field, value=value_to_proto(condition.value)
        )
        return filter_pb2.Filter(equals=equals)
    if isinstance(condition, filters.OneOf):
        one_of = filter_pb2.Filter.OneOf(
            field=condition.field, values=[value_to_proto(v) for v in condition.values]
        )
        return filter_pb2.Filter(one_of=one_of)
    if isinstance(condition, filters.Range):
        between = filter_pb2.Filter.Range(
            field=condition.field, at_least=condition.at_least, below=condition.below
        )
        return filter_pb2.Filter(range=between)
    if isinstance(condition, filters.Prefix):
        prefix = filter_pb2.Filter.Prefix(field=condition.field, prefix=condition.prefix)
        return filter_pb2.Filter(prefix=prefix)
    if isinstance(condition, filters.AllOf):
        return filter_pb2.Filter(all_of=_group(condition.filters))
    if isinstance(condition, filters.AnyOf):
        return filter_pb2.Filter(any_of=_group(condition.filters))
    return filter_pb2.Filter(negated=filter_to_proto(condition.filter))


def _group(conditions: Sequence[filters.Filter]) -> filter_pb2.Filter.Group:
    return filter_pb2.Filter.Group(filters=[filter_to_proto(c) for c in conditions])
